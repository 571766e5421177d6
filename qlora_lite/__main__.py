"""`python -m qlora_lite` is `qlora-lite`."""

from qlora_lite.cli import main

main()
