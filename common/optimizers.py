"""Optimizers that Keras does not provide."""

from typing import Any

import keras
import tensorflow as tf


class FusedAdam(keras.optimizers.Adam):
    """Adam, or AdamW if `weight_decay` is set, with one fused TensorFlow operation per variable.

    Keras 3.15 uses a dozen operations, each a pass over the variable. An embedding gradient has one row per token of a
    batch. For repeated tokens, Keras sums the squares of rows; this class sums the rows first, as Adam is defined.
    Gradients become dense: `keras.optimizers.Adam` is faster for embeddings of millions of rows, most of which a batch
    does not use.
    """

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        """Updates one variable. Keras calls it for each variable."""
        gradient = tf.cast(tf.convert_to_tensor(gradient), variable.dtype)
        if self.amsgrad:
            super().update_step(gradient, variable, learning_rate)
            return
        index, steps = self._get_variable_index(variable), tf.cast(self.iterations + 1, variable.dtype)
        # On several replicas, Keras passes TensorFlow variables.
        var, m, v = (
            (state.value if isinstance(state, keras.Variable) else state).handle
            for state in (variable, self._momentums[index], self._velocities[index])
        )
        tf.raw_ops.ResourceApplyAdam(
            var=var,
            m=m,
            v=v,
            lr=tf.cast(learning_rate, variable.dtype),
            beta1=self.beta_1,
            beta2=self.beta_2,
            beta1_power=self.beta_1**steps,
            beta2_power=self.beta_2**steps,
            epsilon=self.epsilon,
            grad=gradient,
        )


class Muon(FusedAdam):
    """Muon (momentum with orthogonalized updates) for convolution kernels, AdamW for all other variables.

    An orthogonal update moves filters equally far in all directions, not only in those of large gradients
    (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). `keras.optimizers.Muon` supports matrices only;
    this class reshapes a kernel to a matrix [height x width x channels, filters].
    """

    def __init__(
        self,
        learning_rate: Any,
        kernel_speed=2.0,
        kernel_momentum=0.9,
        unit_filters=False,
        weight_decay=0.004,
        **settings: Any,
    ):
        """Initializes the optimizer; `settings` are passed to AdamW.

        Args:
            learning_rate: learning rate of AdamW, for all variables except kernels.
            kernel_speed: learning rate of kernels, as a multiple of `learning_rate`. It scales the orthogonal matrix
                that a step subtracts from a kernel.
            kernel_momentum: momentum of kernel updates.
            unit_filters: normalize filters to mean square norm 1 before each step. Useful before BatchNormalization,
                whose output does not depend on the norm: the learning rate then is an angle.
            weight_decay: weight decay of AdamW; also applied to kernels.
        """
        super().__init__(learning_rate, weight_decay=weight_decay, **settings)
        self.kernel_speed, self.kernel_momentum, self.unit_filters = kernel_speed, kernel_momentum, unit_filters

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        """Updates one variable. Keras calls it for each variable."""
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
        """Returns the configuration of the optimizer."""
        own = ("kernel_speed", "kernel_momentum", "unit_filters")
        return {**super().get_config(), **{name: getattr(self, name) for name in own}}


def orthogonal(matrix: Any) -> Any:
    """Approximates the nearest matrix whose singular values are all 1, by three Newton-Schulz iterations.

    With Jordan's coefficients, all but the smallest singular values end between 0.7 and 1.2. More iterations would also
    raise the smallest ones, which are mostly rounding errors.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return keras.ops.transpose(orthogonal(keras.ops.transpose(matrix)))
    matrix = matrix / (keras.ops.norm(matrix) + 1e-7)
    for _ in range(3):
        square = matrix @ keras.ops.transpose(matrix)
        matrix = 3.4445 * matrix + (2.0315 * square @ square - 4.7750 * square) @ matrix
    return matrix
