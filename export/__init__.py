"""From a profile to other formats; each export is checked against the original."""

from export.archive import export_mar
from export.onnx import export_onnx
from export.torch_export import export_pt2

__all__ = ["export_mar", "export_onnx", "export_pt2"]
