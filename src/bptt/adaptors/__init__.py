"""What other frameworks need to train with this package's layers: one module per framework, imported by its own name.

    from bptt.adaptors import lightning     # truncated_bptt_steps back, callbacks
    from bptt.adaptors import ignite        # handlers, a trainer in pieces
    from bptt.adaptors import skorch        # the policy as a parameter that a search can vary
    from bptt.adaptors import transformers  # the policy in the configuration, a callback
    from bptt.adaptors import accelerate    # the policies in its checkpoints
    from bptt.adaptors import sb3_contrib   # recurrent policies of RecurrentPPO, a rollout in one call
    from bptt.adaptors import torchrl       # LSTMModule and GRUModule with our layer inside
    from bptt.adaptors import opacus        # gradients of each sample for differential privacy

`import bptt` loads none of them. Each needs its framework, which the extra of the same name installs
(`pip install 'bptt[lightning]'`), and raises an ImportError that says so where it is missing.
"""
