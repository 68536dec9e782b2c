"""Views of a run: rows, TensorBoard, tables, charts and pages."""
