"""The network with which batch normalization is introduced, in Keras 3, on real digits.

    pip install "batchnorm[keras]" scikit-learn tensorflow-cpu
    KERAS_BACKEND=tensorflow python examples/keras_mlp.py     # or jax, or torch

One import is different from Keras' own; each normalization has its activation in it.
"""

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from batchnorm.keras import BatchNormalization, calibrate, fold

keras.utils.set_random_seed(0)

images, labels = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(
    (images / 16).astype("float32"), labels, test_size=0.25, random_state=0, stratify=labels
)

model = keras.Sequential(
    [
        keras.Input((64,)),  # 8 x 8 pixels; 784 for the 28 x 28 of MNIST
        keras.layers.Dense(64, use_bias=False),
        BatchNormalization(activation="relu"),
        keras.layers.Dense(64, use_bias=False),
        BatchNormalization(activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(x_train, y_train, epochs=10, batch_size=32, validation_data=(x_test, y_test), verbose=2)

# The moving averages still remember the first epochs. These are the statistics of the data:
print(calibrate(model, [x_train]))
loss, accuracy = model.evaluate(x_test, y_test, verbose=0)
print(f"{keras.backend.backend()}: accuracy on {len(x_test)} test images: {accuracy:.1%}")

# For use: two layers less, the same answers.
folded = fold(model, x_test)
print(folded)
