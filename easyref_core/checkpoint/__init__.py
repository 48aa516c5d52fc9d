"""EasyRef checkpoints: the known formats as data, and opening and saving one."""
