"""The timeline: live bytes by category over the operators of one step, a panel a convolution."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.measure.account import CATEGORIES, Account, Mark
from bench.measure.predict import MIB
from bench.memory.colours import COLOURS
from bench.memory.words import peak_place
from train.files import atomic_write


def draw(path: Path, accounts: dict[str, Account], title: str) -> None:
    """Writes the picture as a PNG."""
    with atomic_write(path) as file:
        timeline(accounts, title).savefig(file, format="png", dpi=110)


def timeline(accounts: dict[str, Account], title: str) -> Figure:
    """One panel for each convolution, one scale for all."""
    figure = Figure(figsize=(10, 1.2 + 2.9 * len(accounts)), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(len(accounts), 1, sharey=True, squeeze=False)[:, 0]
    for axes, (conv, account) in zip(panels, accounts.items(), strict=True):
        draw_panel(axes, conv, account)
    panels[-1].set_xlabel("takings and frees of the step, in order (no times)")
    highest = max(account.peak.nbytes for account in accounts.values()) / MIB
    panels[0].set_ylim(0, 1.35 * highest)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(CATEGORIES), fontsize=8, handlelength=1)
    return figure


def draw_panel(axes: Axes, conv: str, account: Account) -> None:
    curve = list(account.curve())
    places = range(len(curve))
    heights = [[moment[category] / MIB for moment in curve] for category in CATEGORIES]
    colours = [COLOURS[category] for category in CATEGORIES]
    axes.stackplot(places, heights, labels=CATEGORIES, colors=colours, step="post", linewidth=0)
    begin = 0
    for index, item in enumerate(account.entries[account.start :]):
        if isinstance(item, Mark):
            axes.axvline(index + 1, color="black", linewidth=0.6)
            middle = (begin + index) / 2
            axes.text(middle, 0.97, item.phase, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=8)
            begin = index + 1
    peak = account.peak
    where = peak.index - account.start
    axes.annotate(
        f"{peak.nbytes / MIB:,.0f} MiB\n{peak_place(account)}",
        (where, peak.nbytes / MIB), xytext=(-8 if where > len(curve) / 2 else 8, 4), textcoords="offset points",
        ha="right" if where > len(curve) / 2 else "left", va="bottom", fontsize=8,
    )
    axes.plot([where], [peak.nbytes / MIB], marker="v", color="black", markersize=5)
    axes.set(xlim=(0, len(curve) - 1), ylabel=f"{conv}\nMiB live")
    axes.grid(alpha=0.3)
