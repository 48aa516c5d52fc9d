"""EasyRef checkpoints: known formats as data, opening, saving."""
