"""Prompts of the demo, for the bundled model, which has seen nothing but word problems."""

PROMPTS: tuple[tuple[str, str], ...] = (
    (
        "a problem like the one before it",
        "Question: Lisa has 4 boxes of pencils. Each box has 12 pencils. She gives 10 pencils to "
        "her brother. How many pencils does Lisa have left?\n"
        "Answer: Lisa has 4 boxes * 12 pencils/box = <<4*12=48>>48 pencils.\n"
        "After giving 10 pencils to her brother, Lisa has 48 pencils - 10 pencils = "
        "<<48-10=38>>38 pencils left.\n#### 38\n\n"
        "Question: Lisa has 6 boxes of pencils. Each box has 10 pencils. She gives 15 pencils to "
        "her brother. How many pencils does Lisa have left?\nAnswer:",
    ),
    (
        "the same words with every number changed",
        "Question: Tom sells 20 apples on Monday and twice as many apples on Tuesday. Each apple "
        "costs $2. How much money does Tom make in total?\n"
        "Answer: Tom sells 20 * 2 = <<20*2=40>>40 apples on Tuesday.\n"
        "In total, Tom sells 20 + 40 = <<20+40=60>>60 apples.\n"
        "Tom makes 60 * $2 = $<<60*2=120>>120 in total.\n#### 120\n\n"
        "Question: Tom sells 30 apples on Monday and twice as many apples on Tuesday. Each apple "
        "costs $3. How much money does Tom make in total?\nAnswer:",
    ),
    (
        "a problem by itself, with little to look up",
        "Question: A train travels 60 miles per hour for 3 hours and then 40 miles per hour for "
        "2 hours. How many miles does it travel in total?\nAnswer:",
    ),
)
"""What makes a prompt interesting here, and the prompt."""
