"""Drop-in replacements for Keras layers that are faster on CPUs; saved as the Keras layers of the same names."""

from typing import Any

import keras
import tensorflow as tf


class Activation(keras.layers.Activation):
    """`keras.layers.Activation` with a fused gradient of SiLU.

    TensorFlow 2.21 makes seven passes over the activations. XLA fuses them into one, which computes in float32.
    """

    def call(self, inputs: Any) -> Any:
        """Applies the activation."""
        return _silu(inputs) if self.activation is keras.activations.silu else super().call(inputs)


@tf.custom_gradient
def _silu(inputs: tf.Tensor) -> tuple:
    @tf.function(jit_compile=True, autograph=False)
    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        compute_dtype = tf.float64 if inputs.dtype == tf.float64 else tf.float32
        x, grad = tf.cast(inputs, compute_dtype), tf.cast(upstream, compute_dtype)
        sigmoid = tf.sigmoid(x)
        return tf.cast(grad * sigmoid * (1 + x * (1 - sigmoid)), inputs.dtype)

    return tf.nn.silu(inputs), gradient


class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` with one fused operation forward and one backward when training on images.

    Keras 3.15 uses a dozen operations, each a pass over all activations. Falls back to Keras for several replicas,
    layouts other than channels last, masks, and variables that are not float32.
    """

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        """Normalizes [batch, height, width, channels] by batch statistics; in inference, by moving statistics."""
        unsupported = mask is not None or self.renorm or tf.distribute.get_strategy().num_replicas_in_sync > 1
        unsupported = unsupported or len(inputs.shape) != 4 or self.axis not in (-1, 3) or inputs.dtype == tf.float64
        if unsupported or not (training and self.trainable) or self.variable_dtype != "float32":
            return super().call(inputs, training=training, mask=mask)
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=tf.cast(self.gamma, tf.float32) if self.scale else tf.ones_like(self.moving_mean),
            offset=tf.cast(self.beta, tf.float32) if self.center else tf.zeros_like(self.moving_mean),
            mean=[],
            variance=[],
            epsilon=self.epsilon,
            is_training=True,
        )
        size = tf.cast(tf.size(inputs, tf.int64) / inputs.shape[3], tf.float32)
        # TensorFlow returns the unbiased variance, but Keras uses the biased one.
        for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance * (size - 1) / size)):
            moving.assign(moving * self.momentum + value * (1 - self.momentum))
        return outputs


class Conv2D(keras.layers.Conv2D):
    """`keras.layers.Conv2D` with a faster kernel gradient for small bfloat16 images on CPUs.

    With oneDNN 3.7 (TensorFlow 2.21), this gradient takes three to four times as long as the convolution. Here, it is a
    matrix product for each kernel position.
    """

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        """Convolves [batch, height, width, channels]. Falls back to Keras for strides, dilations and larger images."""
        kernel = tf.convert_to_tensor(kernel)
        small = all(size in range(1, 9) for size in inputs.shape[1:3]) and inputs.dtype == tf.bfloat16
        plain = {*self.strides, *self.dilation_rate, self.groups} == {1} and self.data_format == "channels_last"
        if not (small and plain and self.padding in ("same", "valid")) or tf.config.list_physical_devices("GPU"):
            return super().convolution_op(inputs, kernel)
        return _convolution(inputs, kernel, self.padding.upper())


def _convolution(images: tf.Tensor, kernel: tf.Tensor, padding: str) -> tf.Tensor:
    @tf.custom_gradient
    def convolve(images: tf.Tensor, kernel: tf.Tensor) -> tuple:
        def gradients(upstream: tf.Tensor) -> tuple:
            rows, columns, channels, filters = kernel.shape
            image_gradient = tf.nn.conv2d_transpose(upstream, kernel, tf.shape(images), 1, padding)
            paddings = [((size - 1) // 2, size // 2) if padding == "SAME" else (0, 0) for size in (rows, columns)]
            padded, flat = tf.pad(images, [(0, 0), *paddings, (0, 0)]), tf.reshape(upstream, [-1, filters])
            height, width = upstream.shape[1:3]
            products = [
                tf.matmul(tf.reshape(padded[:, y : y + height, x : x + width], [-1, channels]), flat, transpose_a=True)
                for y in range(rows)
                for x in range(columns)
            ]
            return image_gradient, tf.reshape(tf.stack(products), kernel.shape)

        return tf.nn.conv2d(images, kernel, 1, padding), gradients

    return convolve(images, kernel)


def with_stock_layers(model: keras.Model) -> keras.Model:
    """Returns an uncompiled model with Keras' layers instead of the layers of this module.

    It can be loaded without this project. Copies the weights if it replaces layers.
    """
    model = keras.Model(model.input, model.output, name=model.name)
    if f'"module": "{__package__}.' not in model.to_json():
        return model

    def stock(layer: keras.layers.Layer) -> keras.layers.Layer:
        if isinstance(layer, keras.Model):
            return with_stock_layers(layer)
        kind = getattr(keras.layers, type(layer).__name__) if type(layer).__module__ == __name__ else type(layer)
        return kind.from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=stock)
    copy.set_weights(model.get_weights())
    return copy
