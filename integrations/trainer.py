"""Hugging Face's Trainer and Accelerate: everything that training a gate wants, as one callback.

    from tokengate.integrations.trainer import TokenGateCallback

    model = tokengate.patch(model, targets=["q_proj", "v_proj"])
    trainer = Trainer(model, args, train_dataset=data, callbacks=[TokenGateCallback(s=5e-4)])
    trainer.train()

What a callback cannot do, `TokenGateTrainer` does; loops of one's own want `set_penalty_unit`.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from tokengate import TokenGateError
from tokengate.integrations.penalty_unit import set_penalty_unit as set_penalty_unit
from tokengate.integrations.trainer_callback import TokenGateCallback as TokenGateCallback


class TokenGateTrainer(Trainer):
    """What `TokenGateCallback` cannot do from inside a callback; it needs one:

        trainer = TokenGateTrainer(model, args, callbacks=[TokenGateCallback(s=5e-4)])

    TensorBoard and the other reporters are told of a log before any callback of the user's, and
    `evaluate` and `predict` outside of a training announce themselves to nobody. Here the reporters
    get sparsity and tau, too, and both have a `*_sparsity` among their metrics. A training that is
    interrupted or fails leaves the model as one that ended. For another kind of Trainer:
    `class MyTrainer(TokenGateTrainer, SFTTrainer)`.

    Raises:
        TokenGateError: when it is used, there is no `TokenGateCallback` among its callbacks.
    """

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        callback = self._callback()
        try:
            return super().train(*args, **kwargs)
        except BaseException:
            callback.end_training(self.model)
            raise

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, counted."""
        self._callback().start_evaluation(self.model)
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with sparsity and tau."""
        self._callback().add_to(logs)
        super().log(logs, *args, **kwargs)

    def _callback(self) -> TokenGateCallback:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TokenGateCallback):
                return callback
        raise TokenGateError(
            "a TokenGateTrainer was given no TokenGateCallback: pass "
            "callbacks=[TokenGateCallback(s=...)]."
        )
