"""Which class of a data set is which logit of the weights: by name, by number, by place."""

import numpy as np
import pytest

from convit_jax.data import class_mapping, class_names
from convit_jax.data.class_mapping import match

WHERE = {"source": "folder:photos", "loaded": "pets.safetensors"}
IDS = list(class_names.imagenet())
NAMES = list(class_names.imagenet().values())


def test_names_decide_and_not_places():
    found = match(["dog", "cat"], ["cat", "dog"], 2, **WHERE)
    assert (found.logits, found.names, found.how) == ((1, 0), ("dog", "cat"), "by name")
    assert not found.is_identity
    assert match(["cat", "dog"], ["cat", "dog"], 2, **WHERE).is_identity


def test_a_subset_of_the_classes_is_evaluated_over_its_logits():
    found = match(["cow", "ant"], ["ant", "bee", "cow"], 3, **WHERE)
    assert (found.logits, found.kept, found.is_identity) == ((2, 0), (0, 1), False)
    assert not match(["ant", "bee"], ["ant", "bee", "cow"], 3, **WHERE).is_identity


@pytest.mark.parametrize("names", [IDS, NAMES, [str(i) for i in range(1000)]])
@pytest.mark.parametrize("known", [None, IDS])
def test_imagenets_classes_are_found_by_id_name_or_number_in_any_order(names, known):
    found = match(names, known, 1000, **WHERE)
    assert found.is_identity
    assert found.names == tuple(NAMES)
    order = sorted(range(1000), key=lambda i: names[i])  # "0", "1", "10", ... if numbers
    found = match([names[i] for i in order], known, 1000, **WHERE)
    assert list(found.logits) == order
    assert found.names == tuple(NAMES[i] for i in order)
    few = match([names[i] for i in (999, 7, 500)], known, 1000, **WHERE)
    assert few.logits == (999, 7, 500)


def test_weights_that_learned_some_of_imagenets_classes_know_both_names_of_each():
    found = match(["tench", "n01443537"], ["n01443537", "n01440764"], 2, **WHERE)
    assert (found.logits, found.names) == ((1, 0), ("tench", "goldfish"))


def test_case_spaces_hyphens_and_underscores_do_not_count_unless_they_tell_classes_apart():
    found = match(["Great_White-Shark", "tench"], None, 1000, **WHERE)
    assert found.logits == (2, 0)
    assert found.how == "by name, whatever their case, spaces, hyphens and underscores"
    assert match(["A", "a"], ["a", "A"], 2, **WHERE).logits == (1, 0)
    with pytest.raises(ValueError, match=r"1 of the 2 classes of .* pets\.\w+: 'a_b'"):
        match(["a_b", "c"], ["a b", "a-b", "c"], 3, **WHERE)
    with pytest.raises(ValueError, match=r": 'C\+\+'; those"):
        match(["C++"], ["C", "D"], 2, **WHERE)


def test_numbers_mean_the_logits_of_weights_without_names():
    names = sorted(map(str, range(12)))
    found = match(names, None, 12, **WHERE)
    assert [str(logit) for logit in found.logits] == names
    assert found.how == "by number, counted from 0"
    assert match(["3", "1"], None, 12, **WHERE).logits == (3, 1)


def test_places_are_taken_where_neither_has_names_and_that_is_said():
    found = match(["ant", "bee", "cow"], None, 3, **WHERE)
    assert found.is_identity
    assert found.how.startswith("by place, since the weights do not name theirs: 'ant', 'bee', ")
    assert "data.class_order" in found.how
    assert match(["1", "2", "3"], None, 3, **WHERE).how.startswith("by place")
    assert match(["2", "0", "1"], None, 3, ordered=True, **WHERE).logits == (0, 1, 2)


def test_classes_that_the_weights_lack_are_refused_by_name():
    with pytest.raises(ValueError, match=r"1 of the 2 classes of folder:photos .*: 'cow'; those"):
        match(["cow", "cat"], ["cat", "dog"], 2, **WHERE)
    with pytest.raises(ValueError, match=r": 'sunflower'; .*numbers from 0: rename"):
        match(["tench", "sunflower"], None, 1000, **WHERE)
    with pytest.raises(ValueError, match=r"1 of the 2 classes .*: '1000'"):
        match(["n01440764", "1000"], None, 1000, **WHERE)
    with pytest.raises(ValueError, match=r"has 2 classes, but .* 3 logits without names"):
        match(["cow", "cat"], None, 3, **WHERE)
    with pytest.raises(ValueError, match=r"has 2 classes, but .* 3 logits without names"):
        match(["1", "3"], None, 3, **WHERE)


def test_two_classes_are_not_one_logit():
    with pytest.raises(ValueError, match="got 'tench' and 'n01440764' in folder:photos, which are"):
        match(["tench", "n01440764"], None, 1000, **WHERE)
    with pytest.raises(ValueError, match=r"got '1' and '01' .* both class 1"):
        match(["1", "01"], None, 10, **WHERE)


def test_classes_without_images_can_be_left_out():
    found = match(IDS, None, 1000, **WHERE).restrict(np.array([7, 5, 7]))
    assert found.kept == (5, 7)
    assert found.logits[:8] == (-1,) * 5 + (5, -1, 7)


def test_the_same_classes_are_in_the_same_order():
    assert class_mapping.are_same(["cat", "dog"], ["cat", "dog"], 2)
    assert class_mapping.are_same(["cat", "dog"], None, 2)  # nothing says otherwise
    assert not class_mapping.are_same(["dog", "cat"], ["cat", "dog"], 2)
    assert not class_mapping.are_same(["cat", "cow"], ["cat", "dog"], 2)
    assert not class_mapping.are_same(["cat"], ["cat", "dog"], 2)
