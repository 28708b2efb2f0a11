"""Other people's models, read as data: ONNX and torch.export files rebuilt from plain layers, nothing unpickled."""
