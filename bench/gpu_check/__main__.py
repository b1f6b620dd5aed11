"""python -m bench.gpu_check"""

from train.startup import quit_on_interrupt

quit_on_interrupt("bench.gpu_check")  # before the seconds that importing torch takes

from bench.gpu_check.command import main

if __name__ == "__main__":  # not where multiprocessing imports it once more
    main()
