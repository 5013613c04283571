"""The program with `tf.placeholder` and `tf.layers.batch_normalization`, as it is written today.

It used to be, with TensorFlow 1:

    x = tf.placeholder(tf.float32, [None, 784])
    training = tf.placeholder(tf.bool)
    h = tf.layers.dense(x, 64)
    h = tf.layers.batch_normalization(h, training=training)
    h = tf.nn.relu(h)
    ...
    with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
        train_op = tf.train.AdamOptimizer().minimize(loss)
    session.run(train_op, {x: images, y: labels, training: True})

The placeholders are arguments, the session a function, and nobody has to remember the updates: a layer that is called
with `training=True` moves its own statistics.

    pip install "batchnorm[keras]" scikit-learn tensorflow-cpu
    python examples/tensorflow_today.py
"""

import os

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from batchnorm.keras import BatchNormalization

keras.utils.set_random_seed(0)
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype(np.float32)
train, test = np.split(np.random.default_rng(0).permutation(len(images)), [1400])

hidden = keras.layers.Dense(64)
normalization = BatchNormalization(activation="relu")
output = keras.layers.Dense(10)


def network(x: tf.Tensor, training: bool) -> tf.Tensor:
    """Logits; `training` says which statistics are used, and whether they move."""
    return output(normalization(hidden(x), training=training))


network(images[:1], training=False)  # the variables are made
variables = [v for layer in (hidden, normalization, output) for v in layer.trainable_variables]
optimizer = keras.optimizers.Adam()
optimizer.build(variables)


@tf.function(jit_compile=True)
def train_step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """One step of Adam, compiled by XLA."""
    with tf.GradientTape() as tape:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=network(x, training=True))
        loss = tf.reduce_mean(losses)
    optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
    return loss


rng = np.random.default_rng(0)
for epoch in range(10):
    losses = [train_step(images[part], labels[part]) for part in np.array_split(rng.permutation(train), 44)]
    print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}")

predicted = network(images[test], training=False).numpy().argmax(1)
print(f"accuracy on {len(test)} test images: {np.mean(predicted == labels[test]):.1%}")
