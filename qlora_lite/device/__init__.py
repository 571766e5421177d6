"""The device that computes: what it is and can do.

card.py   `Card`, the value that everything else asks         known_cards.py   the cards that people own, from their data sheets
accelerator.py   the one that is here, its memory and random numbers           numerics.py   how its libraries shall compute
host.py   memory of the machine around it                                      tested.py   where the program has been run
out_of_memory.py   which errors mean a lack of memory
"""
