"""Code that was written for Inf-CL: the same names on any device, and one call instead of two."""

import time

import torch
from torch.nn import functional as F

from m3bind import clip_loss
from m3bind.integrations.inf_cl import cal_flash_loss, cal_inf_loss

NUM, DIM = 2048, 200  # no multiple of Inf-CL's head_dim

torch.manual_seed(0)
q = F.normalize(torch.randn(NUM, DIM), dim=-1).requires_grad_()
k = F.normalize(torch.randn(NUM, DIM), dim=-1).requires_grad_()
log_scale = torch.tensor(1 / 0.07).log().requires_grad_()


def two_calls():
    """As in Inf-CL's README: one direction a call."""
    scale = log_scale.exp()
    return (cal_inf_loss(q, k, scale=scale) + cal_inf_loss(k, q, scale=scale)) / 2


def one_call():
    """Both directions in one pass."""
    return clip_loss(q, k, log_scale.exp())


seconds = {}
for function in (two_calls, one_call) * 3:
    q.grad = k.grad = log_scale.grad = None
    start = time.perf_counter()
    loss = function()
    loss.backward()
    taken = time.perf_counter() - start
    seconds[function] = min(taken, seconds.get(function, taken))
    result = f"loss {loss.item():.6f}  gradient of the scale {log_scale.grad.item():.6f}"
    print(f"{function.__name__:9}  {result}  {taken * 1e3:5.0f} ms")

rows = cal_flash_loss(q, k, scale=log_scale.exp())
print(f"cal_flash_loss gives the {len(rows)} rows: mean {rows.mean().item():.6f}")
print(f"one call takes {seconds[one_call] / seconds[two_calls]:.2f} of the time of two")
