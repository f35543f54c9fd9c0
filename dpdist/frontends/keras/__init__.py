"""Private `fit` for Keras 3 models, on the JAX backend.

    from dpdist.frontends import keras as private_keras   # before keras
    import keras

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    private = private_keras.make_private(
      model,
      dpdist.PrivacyConfig(
        num_examples=1438, expected_batch_size=128, num_steps=300,
        l2_clip_norm=1.0, target_delta=1e-5, target_epsilon=3.0),
      workdir="/tmp/digits")
    history = private.fit(x, y, validation_data=(x_test, y_test))
    print(private.epsilon(), history.history["epsilon"][-1])

This `fit` differs from Keras's: the plan's sampler draws batches from the
examples, and nothing is shuffled; steps count noisy updates and not parts of a
batch; no update is made that the plan does not cover; and nothing that is
computed from training examples without noise is shown.
"""

from dpdist.frontends.keras.private_model import PrivateModel as PrivateModel
from dpdist.frontends.keras.private_model import make_private as make_private
from dpdist.frontends.keras_loss import keras as keras

__all__ = ["PrivateModel", "keras", "make_private"]
