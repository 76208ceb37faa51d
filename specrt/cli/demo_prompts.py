"""Prompts of the demo."""

PROMPTS: tuple[tuple[str, str], ...] = (
    (
        "a problem whose steps look alike",
        "Question: A baker sells 12 cakes on Friday, 15 cakes on Saturday and 18 cakes on Sunday. "
        "Each cake costs $5. How much money does the baker make on each day, and how much in "
        "total?\nAnswer:",
    ),
    (
        "a problem after another like it",
        "Question: Lisa has 4 boxes of pencils. Each box has 12 pencils. She gives 10 pencils to "
        "her brother. How many pencils does Lisa have left?\n"
        "Answer: Lisa has 4 * 12 = 48 pencils.\n"
        "After giving 10 pencils to her brother, she has 48 - 10 = 38 pencils left.\n#### 38\n\n"
        "Question: Lisa has 6 boxes of pencils. Each box has 12 pencils. She gives 15 pencils to "
        "her brother. How many pencils does Lisa have left?\nAnswer:",
    ),
    (
        "an answer that goes in circles",
        "Question: A train travels 60 miles per hour for 3 hours and then 40 miles per hour for "
        "2 hours. How many miles does it travel in total?\nAnswer:",
    ),
)
"""What to watch for, and the prompt: for the bundled model, which has seen nothing but such."""

CHAT_PROMPTS: tuple[tuple[str, str], ...] = (
    (
        "a text that is said again",
        "Correct the spelling in this text and repeat it in full: The libary opens at nine "
        "oclock in the morning and closes at six in the evning. On Saturdays the libary opens at "
        "ten oclock in the morning and closes at four in the afternoon. On Sundays it is closed.",
    ),
    (
        "a problem in steps",
        "A baker sells 12 cakes on Friday, 15 cakes on Saturday and 18 cakes on Sunday. Each cake "
        "costs $5. How much money does the baker make on each day, and how much in total?",
    ),
    ("an open question", "Why is the sky blue, and why is it red in the evening?"),
)
"""The same for models that chat: messages of a user."""
