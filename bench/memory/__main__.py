"""python -m bench.memory MODEL"""

from train.startup import quit_on_interrupt

quit_on_interrupt("bench.memory")  # before the seconds that importing torch takes

from bench.memory.command import main

if __name__ == "__main__":  # not where multiprocessing imports it once more
    main()
