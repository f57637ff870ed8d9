"""Optimizers that Keras does not have."""

from typing import Any

import keras
import tensorflow as tf


class FusedAdam(keras.optimizers.Adam):
    """Adam, and with `weight_decay` AdamW, whose step is one TensorFlow operation for each variable.

    In Keras 3.15 a step is a dozen operations, each through the whole variable. The gradient of an embedding has a row
    for each word of the batch: where words repeat, Keras adds up the squares of their rows; here the rows are added
    up first, as Adam is defined. The gradient becomes dense: for tables of millions of rows that a batch hardly
    touches, `keras.optimizers.Adam` is faster.
    """

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        """Updates one variable; Keras calls it for each."""
        gradient = tf.cast(tf.convert_to_tensor(gradient), variable.dtype)
        if self.amsgrad:
            super().update_step(gradient, variable, learning_rate)
            return
        index, steps = self._get_variable_index(variable), tf.cast(self.iterations + 1, variable.dtype)
        # On several replicas, what Keras passes here are TensorFlow's own variables.
        var, m, v = (
            (each.value if isinstance(each, keras.Variable) else each).handle
            for each in (variable, self._momentums[index], self._velocities[index])
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
    """AdamW for all variables but the kernels of convolutions, which learn by momentum with orthogonal steps.

    An orthogonal step moves a layer's filters equally far in all directions, not only in those of large gradients
    (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). `keras.optimizers.Muon` does so for matrices only;
    here a kernel counts as the matrix [height x width x channels, filters].
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
        """Sets the optimizer up; `settings` are those of AdamW.

        Args:
            learning_rate: as of AdamW, for all variables but kernels.
            kernel_speed: the learning rate of kernels as a multiple of `learning_rate`. A step changes a kernel by an
                orthogonal matrix of that size.
            kernel_momentum: the share of the past steps in a kernel's step.
            unit_filters: bring filters back to length 1 (their mean square) before each step. Useful before
                BatchNormalization, for which their length does not matter: the learning rate is then an angle.
            weight_decay: as of AdamW, for kernels too.
        """
        super().__init__(learning_rate, weight_decay=weight_decay, **settings)
        self.kernel_speed, self.kernel_momentum, self.unit_filters = kernel_speed, kernel_momentum, unit_filters

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        """Updates one variable; Keras calls it for each."""
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
        """The settings to make the same optimizer again."""
        own = ("kernel_speed", "kernel_momentum", "unit_filters")
        return {**super().get_config(), **{name: getattr(self, name) for name in own}}


def orthogonal(matrix: Any) -> Any:
    """Roughly the nearest matrix whose singular values are all 1, by three steps of the Newton-Schulz iteration.

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
