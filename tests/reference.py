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


def token_effects(base_logits, logits, ids, real, shift):
    """log p(x_i) - log p_base(x_i), and KL(p || p_base) of what predicts x_i, of (T, V) and (T,).

    NaN at padding, and where no real position predicts x_i.
    """
    changes, kls = [], []
    for i in range(len(ids)):
        by = i - 1 if shift else i
        if by < 0 or not (real[i] and real[by] and 0 <= ids[i] < len(logits[by])):
            changes.append(math.nan)
            kls.append(math.nan)
            continue
        new, old = (_softmax(each[by]) for each in (logits, base_logits))
        changes.append(math.log(new[ids[i]]) - math.log(old[ids[i]]))
        terms = (p * (math.log(p) - math.log(q)) for p, q in zip(new, old, strict=True) if p > 0)
        kls.append(sum(terms))
    return changes, kls


def _softmax(scores):
    exponentials = [math.exp(float(score)) for score in scores]
    return [each / sum(exponentials) for each in exponentials]


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


# The modifications. Each gives m_i for one position, and a function from dL/dm_i to the gradients
# of its parameters and of x_i and w_i.


def lora(x, w, p, scale):
    """Eq. 3, m = scale B A x."""
    z = p["A"] @ x

    def back(grad):
        grad_z = scale * (p["B"].T @ grad)
        return {"A": np.outer(grad_z, x), "B": scale * np.outer(grad, z)}, p["A"].T @ grad_z, 0 * w

    return scale * (p["B"] @ z), back


def dora(x, w, p, scale, W0):
    """(magnitude / norm) (W0 + scale B A) x - W0 x, row by row, with the norm as a constant."""
    z = p["A"] @ x
    V = W0 + scale * p["B"] @ p["A"]
    norms = [norm(row) for row in V]
    c = np.array([p["magnitude"][j] / norms[j] for j in range(len(norms))])

    def back(grad):
        grad_z = scale * (p["B"].T @ (c * grad))
        grads = {
            "A": np.outer(grad_z, x),
            "B": scale * np.outer(c * grad, z),
            "magnitude": np.array([grad[j] * (V[j] @ x) / norms[j] for j in range(len(norms))]),
        }
        return grads, p["A"].T @ grad_z, (c - 1) * grad

    return (c - 1) * w + c * scale * (p["B"] @ z), back


def adalora(x, w, p, scale):
    """m = scale P diag(E) Q x."""
    z = p["Q"] @ x

    def back(grad):
        grad_y = scale * (p["P"].T @ grad)
        grads = {
            "P": scale * np.outer(grad, p["E"] * z),
            "E": grad_y * z,
            "Q": np.outer(p["E"] * grad_y, x),
        }
        return grads, p["Q"].T @ (p["E"] * grad_y), 0 * w

    return scale * (p["P"] @ (p["E"] * z)), back


# Activations of one number, and their derivatives.
ACTIVATIONS = {
    "relu": (lambda z: max(z, 0.0), lambda z: float(z > 0)),
    "tanh": (math.tanh, lambda z: 1 - math.tanh(z) ** 2),
    "silu": (
        lambda z: z / (1 + math.exp(-z)),
        lambda z: (1 + z * (1 - 1 / (1 + math.exp(-z)))) / (1 + math.exp(-z)),
    ),
    "gelu": (
        lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
        lambda z: (
            0.5 * (1 + math.erf(z / math.sqrt(2)))
            + z * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        ),
    ),
}


def adapter(x, w, p, scale, activation):
    """m = scale U act(D x)."""
    act, derivative = ACTIVATIONS[activation]
    z = p["D"] @ x
    a = np.array([act(float(v)) for v in z])

    def back(grad):
        slope = np.array([derivative(float(v)) for v in z])
        grad_z = slope * (scale * (p["U"].T @ grad))
        return {"D": np.outer(grad_z, x), "U": scale * np.outer(grad, a)}, p["D"].T @ grad_z, 0 * w

    return scale * (p["U"] @ a), back


def layer(x, W, b, parameters, modify, tau, penalty, grad, mask=None):
    """One gated layer, forward and backward, position by position.

    x (N, k), W (d, k), b (d) or None, grad (N, d) = dL/dh; tau None is ungated;
    `modify(x_i, w_i)` is one of the modifications above with its parameters.
    Returns a dict with h, S, m and the gradients of x, of the parameters and of tau.
    """
    n, d = len(x), len(W)
    w = np.array([[sum(W[j][c] * x[i][c] for c in range(len(x[i]))) for j in range(d)]
                  for i in range(n)]).reshape(n, d)  # fmt: skip
    modified = [modify(x[i], w[i]) for i in range(n)]
    m = np.array([m_i for m_i, _ in modified]).reshape(n, d)
    if tau is None:
        h, opened = w + m, [True] * n
    else:
        h, opened = gate_forward(w, m, tau)
    grad_w, grad_m, g = gate_backward(m, opened, grad, penalty, mask)
    grads = {name: np.zeros(np.shape(value)) for name, value in parameters.items()}
    grads |= {"x": np.zeros(np.shape(x)), "tau": -g}
    for i in range(n):
        own, grad_x, more_w = modified[i][1](grad_m[i])
        for name in own:
            grads[name] += own[name]
        grads["x"][i] = W.T @ (grad_w[i] + more_w) + grad_x
    return {"h": h if b is None else h + b, "S": opened, "m": m, **grads}


def experts(x, index, W, b, parameters, modify, taus, penalty, grad, mask=None):
    """One projection of E experts: position i goes to those of index[i], (N, K).

    x (N, k), W (E, d, k), b (E, d) or None, grad (N, K, d); of `parameters` each has one more
    dimension in front; `modify(e, x_i, w_i)` is a modification with the parameters of expert e;
    `mask` is of positions. Returns what `layer` does, h and S of (N, K), the gradient of x summed.
    """
    found = {"h": np.zeros(np.shape(grad)), "S": np.ones(np.shape(index), dtype=bool)}
    found |= {name: np.zeros(np.shape(value)) for name, value in parameters.items()}
    found |= {"x": np.zeros(np.shape(x)), "tau": np.zeros(len(W))}
    for e in range(len(W)):
        rows = [(i, j) for i in range(len(x)) for j in range(len(index[i])) if index[i][j] == e]
        if not rows:
            continue
        own = layer(
            [x[i] for i, _ in rows],
            W[e],
            None if b is None else b[e],
            {name: value[e] for name, value in parameters.items()},
            lambda x_i, w_i, e=e: modify(e, x_i, w_i),
            None if taus is None else taus[e],
            penalty,
            np.array([grad[i][j] for i, j in rows]),
            None if mask is None else [mask[i] for i, _ in rows],
        )
        for n, (i, j) in enumerate(rows):
            found["h"][i][j], found["S"][i][j] = own["h"][n], own["S"][n]
            found["x"][i] += own["x"][n]
        for name in (*parameters, "tau"):
            found[name][e] = own[name]
    return found


def sparsity(samples):
    """Eq. 23 averaged over samples: each one is the list of its positions' S."""
    return sum(1 - sum(s) / len(s) for s in samples) / len(samples)


# Gates other than the paper's: h_i = w_i + a_i m_i, with a_i in [0, 1].


def weighed(w, m, a, grad):
    """h, dL/dm and dL/da = mu (eq. 10) for w, m of shape (N, C) and a of N numbers."""
    h, grad_m, mu = np.array(w, dtype=np.float64), np.zeros(np.shape(m)), np.zeros(len(a))
    for i in range(len(a)):
        for j in range(len(w[i])):
            h[i][j] = float(w[i][j]) + float(a[i]) * float(m[i][j])
            grad_m[i][j] = float(a[i]) * float(grad[i][j])
            mu[i] += float(grad[i][j]) * float(m[i][j])
    return h, grad_m, mu


def sigmoid_gate(x, v, c, training):
    """GateRA: a_i = sigmoid(v . x_i + c), or whether that is at least 1/2."""
    sums = [sum(float(p) * float(q) for p, q in zip(v, x_i, strict=True)) + c for x_i in x]
    return [1 / (1 + math.exp(-s)) if training else float(s >= 0) for s in sums]


def sigmoid_backward(x, a, mu, penalty, mask=None):
    """dL/dv and dL/dc, where each real position adds the penalty times its entropy to L."""
    grad_v, grad_c = np.zeros(len(x[0])), 0.0
    for i in range(len(a)):
        slope = float(mu[i])
        if mask is None or mask[i]:
            slope += penalty * math.log((1 - a[i]) / a[i])
        slope *= a[i] * (1 - a[i])
        grad_v += slope * np.array([float(p) for p in x[i]])
        grad_c += slope
    return grad_v, grad_c


# A convolution, as a linear layer of the patch that each output pixel sees.


def outside(i, size, mode):
    """Which of `size` pixels stands at place i, which may be outside; None for a zero."""
    if 0 <= i < size:
        return i
    if mode == "zeros":
        return None
    if mode == "circular":
        return i % size
    if mode == "replicate":
        return min(max(i, 0), size - 1)
    return -i if i < 0 else 2 * (size - 1) - i  # reflect, without the edge itself


def patches(shape, kernel, stride, edges, dilation, mode):
    """Of each output pixel (b, y, x), in this order: the elements of (B, C, H, W) that it sees.

    As indices, or None for a zero; channels first, then rows and columns of the kernel. `edges` are
    the pixels added on top and below, and left and right.
    """
    batch, channels, height, width = shape
    (top, bottom), (left, right) = edges
    found = []
    for b in range(batch):
        for y in range(0, height + top + bottom - dilation[0] * (kernel[0] - 1), stride[0]):
            for x in range(0, width + left + right - dilation[1] * (kernel[1] - 1), stride[1]):
                seen = []
                for c in range(channels):
                    for u in range(kernel[0]):
                        for v in range(kernel[1]):
                            row = outside(y + u * dilation[0] - top, height, mode)
                            column = outside(x + v * dilation[1] - left, width, mode)
                            zero = row is None or column is None
                            seen.append(None if zero else (b, c, row, column))
                found.append(seen)
    return found


def gathered(image, places):
    """(N, C kh kw), the patches of an image; and the way back of their gradients."""
    x = [[0.0 if p is None else float(image[p]) for p in seen] for seen in places]

    def back(grad):
        total = np.zeros(np.shape(image))
        for i, seen in enumerate(places):
            for k, p in enumerate(seen):
                if p is not None:
                    total[p] += grad[i][k]
        return total

    return np.array(x), back


def ungrouped(weight, groups):
    """(d, C kh kw) of a convolution's weight (d, C / groups, kh, kw), with zeros between groups."""
    outs, ins = len(weight), int(np.prod(np.shape(weight)[1:]))
    W = np.zeros((outs, ins * groups))
    for j in range(outs):
        start = j // (outs // groups) * ins
        W[j][start : start + ins] = np.reshape(weight[j], -1)
    return W


def fisher_scores(calls):
    """The sum over positions of <G_i, a_i m_i>^2, from G, h and W0 x + b of calls, `(N, C)`."""
    total = 0.0
    for grad, h, out in calls:
        for i in range(len(h)):
            modified = [float(h[i][j] - out[i][j]) for j in range(len(h[i]))]
            total += sum(float(g) * m for g, m in zip(grad[i], modified, strict=True)) ** 2
    return total


def firm_gate(w, m, tau, k):
    """a_i = clamp(k / (k - 1) (1 - tau / r_i), 0, 1), r = ||m|| / ||w||; and da_i/d||m_i||."""
    weights, slopes = [], []
    for w_i, m_i in zip(w, m, strict=True):
        r = norm(m_i) / norm(w_i)
        a = 1.0 if tau <= 0 else 0.0 if r < tau else k / (k - 1) * (1 - tau / r)
        weights.append(min(a, 1.0))
        inside = 0 < a < 1
        slopes.append(k / (k - 1) * tau / r**2 / norm(w_i) if inside else 0.0)
    return weights, slopes


def fisher(gs, mask=None):
    """E[g g'] over the real positions, open or closed: `(N, r)` -> `(r, r)`."""
    real = [g for i, g in enumerate(gs) if mask is None or mask[i]]
    total = np.zeros((len(gs[0]), len(gs[0])))
    for g in real:
        total += np.outer(g, g)
    return total / len(real)


def smoothed(values, decay):
    """A moving average of what comes step by step, corrected for its start."""
    average = 0.0
    for step, value in enumerate(values, start=1):
        average = decay * average + (1 - decay) * value
        corrected = average / (1 - decay**step)
    return corrected


def fisher_gate(z, Q, T):
    """S_i = [sqrt(z_i' Q z_i) >= T]."""
    return [not math.sqrt(max(float(z_i @ Q @ z_i), 0.0)) < T for z_i in z]
