"""What `peft-kernels finetune` is made of: model, data, arms, loop, checkpoint, report. Not a training framework.

One run trains one or two *arms*: our layers or schedule, and for comparison PEFT's layers, plain PyTorch or the whole
model from the same weights.
"""
