"""What a score has to beat: always the most frequent class, and TF-IDF with logistic regression."""

import numpy as np

MAX_TRAIN = 100_000  # training rows that TF-IDF sees at most


def majority(train_labels: np.ndarray, n: int, classes: int) -> np.ndarray:
    """The training classes' shares as the probabilities of each of n texts, (n, K)."""
    share = np.bincount(train_labels, minlength=classes) / len(train_labels)
    return np.tile(share, (n, 1))


def tfidf(
    train_texts: list[str],
    train_labels: np.ndarray,
    evaluated: dict[str, list[str]],
    *,
    classes: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Class probabilities (n, K) float32 of each list of texts, from a linear model.

    Character 1- to 4-grams inside words, which serve languages without spaces too; sublinear term
    frequency, in at least two texts, 200,000 features; classes balanced.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if len(train_texts) > MAX_TRAIN:
        rows = np.random.default_rng(seed).choice(len(train_texts), MAX_TRAIN, replace=False)
        one_of_each = np.unique(train_labels, return_index=True)[1]
        rows = np.concatenate([rows, np.setdiff1d(one_of_each, rows)])
        train_texts, train_labels = [train_texts[i] for i in rows], train_labels[rows]
    vectorizer = TfidfVectorizer(
        analyzer="char_wb",
        ngram_range=(1, 4),
        sublinear_tf=True,
        min_df=2 if len(train_texts) > 100 else 1,
        max_features=200_000,
        dtype=np.float32,
    )
    model = LogisticRegression(class_weight="balanced", max_iter=1000)
    model.fit(vectorizer.fit_transform(train_texts), train_labels)
    result = {}
    for name, texts in evaluated.items():
        probability = np.zeros((len(texts), classes), dtype=np.float32)
        probability[:, model.classes_] = model.predict_proba(vectorizer.transform(texts))
        result[name] = probability
    return result
