"""The equations in plain float64 loops over positions: slow, and meant to be read.

Source: PEFT_S (TS-PEFT, arXiv 2511.16147), equations by number. Nothing of the library is used.
"""

import math

import numpy as np


def norm(v):
    return math.sqrt(sum(float(x) ** 2 for x in v))


def is_open(w_i, m_i, tau):
    """Eq. 4, multiplied out: closed if ||m_i|| < tau ||w_i||."""
    return not norm(m_i) < tau * norm(w_i)


def gate_forward(w, m, tau):
    """Eq. 2 for w, m of shape (N, C): h of shape (N, C) and S as N booleans."""
    h, opened = np.array(w, dtype=np.float64), []
    for i in range(len(w)):
        opened.append(is_open(w[i], m[i], tau))
        if opened[i]:
            for j in range(len(w[i])):
                h[i][j] = float(w[i][j]) + float(m[i][j])
    return h, opened


def gate_backward(m, opened, grad, penalty, mask=None):
    """dL/dw, dL/dm and g (eq. 10, 14, 15 and 17) from dL/dh = grad of shape (N, C)."""
    grad_w, grad_m, g = np.array(grad, dtype=np.float64), np.zeros(np.shape(grad)), 0.0
    for i in range(len(m)):
        if opened[i]:
            grad_m[i] = grad[i]
        if mask is not None and not mask[i]:
            continue
        mu = sum(float(a) * float(b) for a, b in zip(grad[i], m[i], strict=True))
        if (mu >= 0) == opened[i]:
            g += mu
        if opened[i]:
            g += penalty
    return grad_w, grad_m, g


def tau_adam(tau, gs, s, alpha=1.0, beta1=0.9, beta2=0.98, eps=1e-8):
    """Eq. 18-22: the trajectory of tau under the directions g_1, g_2, ..."""
    m = v = 0.0
    trajectory = []
    for k, g in enumerate(gs, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**k)
        v_hat = v / (1 - beta2**k)
        tau = tau + alpha * s * m_hat / (math.sqrt(v_hat) + eps)
        trajectory.append(tau)
    return trajectory


def lora_layer(x, W, b, A, B, scale, tau, penalty, grad):
    """One gated LoRA layer, forward and backward, position by position.

    x (N, k), W (d, k), b (d) or None, A (r, k), B (d, r), grad (N, d) = dL/dh; tau None is ungated.
    Returns a dict with h, S and the gradients of x, A, B and tau.
    """
    n = len(x)
    w = np.array([[sum(W[j][c] * x[i][c] for c in range(len(x[i]))) for j in range(len(W))]
                  for i in range(n)]).reshape(n, len(W))  # fmt: skip
    z = np.array([A @ x[i] for i in range(n)])
    m = np.array([scale * (B @ z[i]) for i in range(n)]).reshape(n, len(W))
    if tau is None:
        h, opened = w + m, [True] * n
    else:
        h, opened = gate_forward(w, m, tau)
    grad_w, grad_m, g = gate_backward(m, opened, grad, penalty)
    grads = {"x": np.zeros_like(x), "A": np.zeros_like(A), "B": np.zeros_like(B), "tau": -g}
    for i in range(n):
        back = scale * (B.T @ grad_m[i])  # dL/dz_i
        grads["B"] += scale * np.outer(grad_m[i], z[i])
        grads["A"] += np.outer(back, x[i])
        grads["x"][i] = W.T @ grad_w[i] + A.T @ back
    return {"h": h if b is None else h + b, "S": opened, **grads}


def sparsity(samples):
    """Eq. 23 averaged over samples: each one is the list of its positions' S."""
    return sum(1 - sum(s) / len(s) for s in samples) / len(samples)
