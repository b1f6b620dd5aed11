"""python -m attacks.run {pgd,sweep,saliency,robust} CHECKPOINT"""

from attacks.run.command import main

main()
