"""Training of the learned residual on the simulator, and its export to ONNX."""
