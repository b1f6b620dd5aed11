"""python -m bench.report_card [MODEL ...]"""

from train.startup import quit_on_interrupt

quit_on_interrupt("bench.report_card")  # before the seconds that importing torch takes

from bench.report_card.command import main

if __name__ == "__main__":  # not where multiprocessing imports it once more
    main()
