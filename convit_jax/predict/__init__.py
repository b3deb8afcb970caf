"""Classification of pictures: the library behind `convit predict`."""

from convit_jax.predict.files import find_images, predict_files
from convit_jax.predict.predictor import Prediction, Predictor
from convit_jax.predict.preprocess import Preprocess

__all__ = ["Prediction", "Predictor", "Preprocess", "find_images", "predict_files"]
