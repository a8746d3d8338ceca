"""Fit how sure a method is on held-out shots: one temperature."""

from __future__ import annotations

import torch
from torch import Tensor

from cdc_models.engine.evaluate import Labelled, extract_features
from cdc_models.methods.base import Method

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
        ValueError: for an empty loader, or targets that do not fit the images or the classes.
    """
    features = extract_features(model, loader, progress=False)
    targets = model.check_targets(features.image, features.targets).to(features.image.device)
    parameters, negative_log_likelihood = model.calibration(features.image, model.cached_text_features(), targets)
    optimizer = torch.optim.LBFGS(parameters, max_iter=max_iter, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = negative_log_likelihood()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float(negative_log_likelihood())
