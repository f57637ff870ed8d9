"""Optimizers that Keras does not have."""

from typing import Any

import keras


class Muon(keras.optimizers.AdamW):
    """AdamW, but convolutions learn by momentum whose every step is made orthogonal.

    All directions in which a layer's filters can move are then taken equally far, not only those of large gradients
    (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). `keras.optimizers.Muon` does so for matrices only;
    here a kernel counts as the matrix [height x width x channels, filters].
    """

    def __init__(self, learning_rate: Any, kernel_speed=2.0, kernel_momentum=0.9, unit_filters=False, **settings: Any):
        """Sets the optimizer up.

        Args:
            learning_rate: as of AdamW, for all that is no kernel of a convolution.
            kernel_speed: the learning rate of kernels, in learning rates. A step changes a kernel by an orthogonal
                matrix of that size.
            kernel_momentum: the share of the past in a kernel's step.
            unit_filters: bring filters back to length 1 (their mean square) before each step. Of use in front of
                BatchNormalization, which makes their length immaterial: the learning rate is then an angle.
            settings: as of AdamW; the weight decay is that of kernels too.
        """
        super().__init__(learning_rate, **settings)
        self.kernel_speed, self.kernel_momentum, self.unit_filters = kernel_speed, kernel_momentum, unit_filters

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        """Changes one variable; Keras calls it for each."""
        if len(variable.shape) != 4:
            super().update_step(gradient, variable, learning_rate)
            return
        velocity = self._momentums[self._get_variable_index(variable)]
        self.assign(velocity, self.kernel_momentum * velocity + gradient)
        filters = keras.ops.reshape(variable, [-1, variable.shape[-1]])
        if self.unit_filters:
            filters = filters / keras.ops.norm(filters) * variable.shape[-1] ** 0.5
        step = orthogonal(keras.ops.reshape(gradient + self.kernel_momentum * velocity, filters.shape))
        filters = filters - keras.ops.cast(learning_rate, variable.dtype) * self.kernel_speed * step
        self.assign(variable, keras.ops.reshape(filters, variable.shape))

    def get_config(self) -> dict[str, Any]:
        """Everything that makes the same optimizer again."""
        own = ("kernel_speed", "kernel_momentum", "unit_filters")
        return {**super().get_config(), **{name: getattr(self, name) for name in own}}


def orthogonal(matrix: Any) -> Any:
    """Roughly the nearest matrix whose singular values are all 1, by three steps of Newton and Schulz's iteration.

    The coefficients are Jordan's: all but the smallest singular values end between 0.7 and 1.2. More steps would bring
    the smallest there too, which are rounding errors for the most part.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return keras.ops.transpose(orthogonal(keras.ops.transpose(matrix)))
    matrix = matrix / (keras.ops.norm(matrix) + 1e-7)
    for _ in range(3):
        square = matrix @ keras.ops.transpose(matrix)
        matrix = 3.4445 * matrix + (2.0315 * square @ square - 4.7750 * square) @ matrix
    return matrix
