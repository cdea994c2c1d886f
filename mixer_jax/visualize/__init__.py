"""Figures. Each call returns a Matplotlib Figure; `save_figure` writes it to a file.

A notebook shows a Figure after the line `%matplotlib inline`.
"""

from mixer_jax.visualize.confusion import draw_confusion_matrix as draw_confusion_matrix
from mixer_jax.visualize.files import save_figure as save_figure
from mixer_jax.visualize.mixing import draw_mixing as draw_mixing
from mixer_jax.visualize.preview import draw_preview as draw_preview
from mixer_jax.visualize.runs import draw_runs as draw_runs
from mixer_jax.visualize.weights import draw_weights as draw_weights
