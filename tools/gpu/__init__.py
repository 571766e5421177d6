"""What tools/gpu_check runs on a card (items.py and the files that it names), and the wheels that it takes there (pack.py)."""
