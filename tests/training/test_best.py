"""Which evaluation is the best."""

from qlora_lite.training.best import Best, best_after


def after(*losses):
    best = None
    for number, loss in enumerate(losses, 1):
        best = best_after(best, step=10 * number, eval_loss=loss)
    return best


def test_the_lowest_loss_is_the_best_and_what_came_after_it_is_counted():
    assert after(3.0) == Best(10, 3.0, 0)
    assert after(3.0, 2.0, 2.5, 2.1) == Best(20, 2.0, 2)
    assert after(3.0, 2.0, 2.5, 1.0) == Best(40, 1.0, 0)


def test_of_equal_losses_the_earlier_one_stays():
    assert after(2.0, 2.0, 2.0) == Best(10, 2.0, 2)
