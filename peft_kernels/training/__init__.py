"""What `peft-kernels finetune` is made of: model, data, arms, loop, checkpoint, report. Not a training framework.

One run trains one or two *arms*: our layers, and for comparison PEFT's over the same frozen weights.
"""
