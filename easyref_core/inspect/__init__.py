"""Inspection: attention maps, influence, reference share, duplicates, and their drawings.

    from easyref_core.inspect import attention_maps, influence, reports

    shares = attention_maps.attention_shares(model, model.encode(images, prompt))
    reports.attention_report(images, shares).image.save("attention.png")
    print(reports.influence_report(images, influence.reference_influence(model, images, prompt)).text)

Images are PIL images or (H, W, C) tensors in 0..1.
"""
