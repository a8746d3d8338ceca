"""Fit how sure a method is on held-out shots: one temperature."""

from __future__ import annotations

import torch
from torch import Tensor

from cdc_models.clip.checks import check_count
from cdc_models.engine.evaluate import Labelled, extract_features
from cdc_models.methods.base import Method, out_of_inference

__all__ = ["calibrate"]


def calibrate(model: Method, loader: Labelled, *, max_iter: int = 100) -> float:
    """Fit one temperature that says how sure a method is, by likelihood on images it was not trained on.

    Softmax methods divide their logits by it (Guo et al., ICML 2017), CDC the logits of its evidence, where the
    likelihood is that of the expected class probability. The prompts stay as they are. The images
    pass through the towers once; the fit itself (L-BFGS) takes milliseconds.

    Args:
        model: any method. Changed in place, and with it every copy that `with_classes` made of it, or that it was made
            from: they share the learned parameters and the temperature (for CDC, scale and bias of its evidence),
            so that one fit serves all classes. Only classes and text features are a copy's own. To calibrate for
            some classes alone, calibrate a `copy.deepcopy`, or load the adapter again.
        loader: yields (images, targets), such as four held-out shots per class; or features of them.
        max_iter: L-BFGS iterations.

    Returns:
        Mean negative log-likelihood after the fit.

    Raises:
        ValueError: for what `extract_features` refuses, targets that do not fit the images or the classes, or no
            iterations.

    Source: temperature scaling, "On Calibration of Modern Neural Networks" (Guo et al., ICML 2017); the temperature of
    CDC's evidence is our reading.

    Example:
        >>> import torch
        >>> from cdc_models import ZeroShot, calibrate, load_clip
        >>> model = ZeroShot(load_clip("bundled"), ["cat", "dog"])
        >>> images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        >>> loss = calibrate(model, [(images, torch.tensor([0, 1, 1, 0]))])
        >>> loss < 0.7, float(model.temperature) != 1  # ln 2 = 0.693... is what a coin says
        (True, True)
    """
    check_count("max_iter", max_iter)
    features = extract_features(model, loader, progress=False)
    image, targets = features.image, model.check_targets(features.image, features.targets).to(features.image.device)
    # also where the caller's code is in inference mode, or was when it read the features
    with torch.inference_mode(False), torch.enable_grad():
        image, targets = out_of_inference(image), out_of_inference(targets)
        parameters, negative_log_likelihood = model.calibration(image, model.cached_text_features(), targets)
        optimizer = torch.optim.LBFGS(parameters, max_iter=max_iter, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = negative_log_likelihood()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            return float(negative_log_likelihood())
