"""python -m attacks.run {pgd,sweep,saliency,robust} CHECKPOINT"""

from train.startup import quit_on_interrupt

quit_on_interrupt("attacks.run")  # before the seconds that importing torch takes

from attacks.run.command import main

main()
