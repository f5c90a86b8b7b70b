"""The trainings of `benchmarks/peers.py`: one small one for each framework, with torch's layers and with ours."""
