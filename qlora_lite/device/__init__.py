"""The device that computes: its properties and abilities.

card.py            `Card`: the properties of a device, in one value
known_cards.py     figures of common cards, from their data sheets
accelerator.py     the accelerator of this machine: memory, random numbers
numerics.py        settings of its libraries: fp32 sums, attention kernels
out_of_memory.py   recognize errors that mean a lack of memory
tested.py          the cards on which this program has run
waiting.py         how long threads spin before they sleep
"""
