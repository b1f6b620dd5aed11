"""The colours of the categories, the same on the console and in the timeline."""

from bench.measure.account import GRADIENTS, INPUT, OPTIMIZER, PARAMETERS, SAVED, TEMPORARY, WORKSPACE

COLOURS = {
    PARAMETERS: "#1f77b4",
    GRADIENTS: "#2ca02c",
    OPTIMIZER: "#9467bd",
    INPUT: "#b0b0b0",
    SAVED: "#17becf",
    TEMPORARY: "#daa520",
    WORKSPACE: "#d62728",
}
