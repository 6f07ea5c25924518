"""Several tokens of one text a step, with the bits of single steps.

A loop that guesses what follows feeds its guess with the latest token, and keeps what is right.
Here ``guess`` gets a text and returns tokens that may follow; the text is the one without guesses:

    from mlx_flashhead.wide.step import WideSteps
    from mlx_flashhead.wide.trial import established_costs

    def generate(model, prompt, guess, n_tokens):
        caches = make_prompt_cache(model)
        steps = WideSteps.of(model)
        established_costs(steps, caches)  # on this machine once: {2: 1.1, 4: 1.3, …} single steps
        logits = model(mx.array([prompt]), cache=caches)
        text = [mx.argmax(logits[0, -1]).item()]
        while len(text) < n_tokens:
            fed = [text[-1], *guess(text)]
            width = max((w for w in steps.costs(caches) if w <= len(fed)), default=1)
            if width == 1:
                logits = model(mx.array([fed[:1]]), cache=caches)
                text.append(mx.argmax(logits[0, -1]).item())
                continue
            step = steps.feed(mx.array([fed[:width]]), caches)
            chosen = mx.argmax(step.logits[0], axis=-1).tolist()  # after each of these tokens
            n_right = 0
            while n_right < width - 1 and chosen[n_right] == fed[n_right + 1]:
                n_right += 1
            step.back_to(n_right + 1)  # the caches hold the latest token and what was right
            text += chosen[: n_right + 1]
        return text

``step`` has both classes. It feeds a ``twin`` of the model, whose layers get ``stand_ins`` for
their caches and values of ``positions``. A stand-in is made before a step: it is the mark from
which ``back_to(n)`` keeps n tokens. Keys and values are trimmed, what a window has written over is
put back, and ``states`` are made anew. ``trial`` tries it all on this machine, ``store`` keeps what
was found, and ``parts`` says whether a model has changed since. ``head_states`` hears the states of
a model and its twins, for whoever guesses by them. Nothing here knows who guesses.
"""
