"""What the rows that tests make have in common: one model, measured on one device that nobody has."""

COMMON = {
    "time": "2026-01-01T00:00:00+00:00",
    "device": "some-gpu",
    "device_name": "Some GPU",
    "model": "a/model",
    "weights": "checkpoint",
    "dtype": "bfloat16",
    "seed": 42,
    "threads": 0,
    "tmbench": "0.1.0",
    "python": "3.12",
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "environment": "abc",
}
