"""python -m bench.reproduce"""

from train.startup import quit_on_interrupt

quit_on_interrupt("bench.reproduce")  # before the seconds that importing torch takes

from bench.reproduce.command import main

main()
