"""Which branch each layer listens to on given text: by channel, by position, by kind of token, and token by token."""

from fusiontree.eval.gates.observe import ReadText, read_text, watch
from fusiontree.eval.gates.page import gate_page
from fusiontree.eval.gates.pictures import draw_gates

__all__ = ["ReadText", "draw_gates", "gate_page", "read_text", "watch"]
