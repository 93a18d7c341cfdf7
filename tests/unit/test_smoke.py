import torch
from fusion_merge import *


def test_all(modelpool, taskpool, tmp_path):
    for cls in (RankOneMoEAlgorithm, WEMoEAlgorithm, EWEMoEAlgorithm):
        kw = {"rank_k": 4} if cls is RankOneMoEAlgorithm else {}
        m = cls(max_steps=3, batch_size=4, save_checkpoint=str(tmp_path / "r.ckpt"), **kw)
        model = m.run(modelpool)
        r = taskpool.evaluate(model)
        print(r, m.record)
        m2 = cls(max_steps=3, batch_size=4, checkpoint=str(tmp_path / "r.ckpt"), **kw)
        model2 = m2.run(modelpool)
        x = torch.randn(3, 3, 16, 16)
        assert torch.equal(model(x).pooler_output, model2(x).pooler_output)
        model.save_pretrained(tmp_path / cls.__name__)
        back = MergedCLIPVisionModel.from_pretrained(tmp_path / cls.__name__)
        assert torch.equal(model(x).pooler_output, back(x).pooler_output)
    for cls in (TaskArithmeticAlgorithm, SimpleAverageAlgorithm, DummyAlgorithm):
        print(taskpool.evaluate(cls().run(modelpool)))
    print(taskpool.evaluate(CLIPFinetuneAlgorithm(max_steps=5, batch_size=4, lr=1e-3).run(modelpool)))
