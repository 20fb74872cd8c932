import darcnn.runtime  # noqa: F401 - before onnxruntime, whose telemetry it switches off
