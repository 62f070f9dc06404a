"""The ledger of a training run: what each measured step did to the entropy, and which kinds of rollouts did it."""
