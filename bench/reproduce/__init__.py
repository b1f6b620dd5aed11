"""One command that turns images into the course write-up's report, ours beside theirs.

    plan.py      which commands of the lab are run, in which order: data
    stages.py    runs them, each once, and remembers how each ended
    check.py     a command of its own: the convolutions against nn.Conv2d, as the write-up checked its own
    results.py   what they left behind, read back; what is missing says why
    report.py    the report, of accuracy.py's, cost.py's and robustness.py's sections
    page.py      tables in Markdown, and one HTML file of it all
    command.py   python -m bench.reproduce
"""
