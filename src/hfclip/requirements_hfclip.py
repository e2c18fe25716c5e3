"""What the fields of a tower's config have to hold together; errors say what was found, what was expected and what to do."""

from .limits_hfclip import MAX_NUMBER, MAX_PARAMETERS


class Requirements:
    """Checks that configs of several towers share, for their `validate_architecture`."""

    def _require(self, holds: bool, found: str, expected: str, remedy: str) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: found {found}, expected {expected}. {remedy}")

    def _require_finite(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(
                value is None or abs(value) <= 1e6,
                f"{name}={value}",
                "a finite number, at most a million",
                f"Leave {name} out.",
            )

    def _require_initializer_factor(self) -> None:
        factor = self.initializer_factor
        remedy = "It scales standard deviations of weights that are drawn anew: set it to 1.0."
        self._require(0 <= factor <= 1e6, f"initializer_factor={factor}", "a number from 0", remedy)

    def _require_parameters(self, num_parameters: int) -> None:
        self._require(
            num_parameters <= MAX_PARAMETERS,
            f"sizes that make {num_parameters:.1e} parameters",
            f"at most {MAX_PARAMETERS:.0e}",
            "Correct hidden_size, intermediate_size, num_hidden_layers or vocab_size.",
        )

    def _require_eps(self) -> None:
        self._require(
            0 < self.layer_norm_eps <= 1,
            f"layer_norm_eps={self.layer_norm_eps}",
            "a positive number, at most 1",
            "CLIP has 1e-5.",
        )

    def _require_transformer(self, num_embeddings: int) -> None:
        self._require_eps()
        self._require_initializer_factor()
        in_blocks = self.num_hidden_layers * 2 * (2 * self.hidden_size + self.intermediate_size)
        self._require_parameters((in_blocks + num_embeddings) * self.hidden_size)
        self._require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size={self.hidden_size} and num_attention_heads={self.num_attention_heads}",
            "a hidden size that the number of heads divides",
            "Published models use 64 units a head.",
        )
        self._require(
            0.0 <= self.attention_dropout < 1.0,
            f"attention_dropout={self.attention_dropout}",
            "a probability in [0, 1)",
            "CLIP is trained with 0.",
        )

    def _require_ids(self) -> None:
        pad = self.pad_token_id
        highest = self.vocab_size - 1 if self.reads_padding else MAX_NUMBER
        self._require(
            pad is None or 0 <= pad <= highest,
            f"pad_token_id={pad} with vocab_size={self.vocab_size}",
            "an id of the vocabulary",
            "Give the id of the tokenizer's padding token.",
        )
        self._require(
            0 <= self.eos_token_id < self.vocab_size,
            f"eos_token_id={self.eos_token_id} with vocab_size={self.vocab_size}",
            f"an id from 0 to {self.vocab_size - 1}",
            "Give the id of the tokenizer's end-of-text token: the embedding is read at its first position.",
        )
