// The vectors of a transformers.js folder: node clip.mjs PARENT FOLDER DTYPE; pictures 0.png, 1.png, 2.png lie here.
import {
  AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, env,
} from '@huggingface/transformers';

const [parent, folder, dtype] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = parent + '/';
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const processor = await AutoProcessor.from_pretrained(folder);
const text = await CLIPTextModelWithProjection.from_pretrained(folder, { dtype });
const vision = await CLIPVisionModelWithProjection.from_pretrained(folder, { dtype });
const inputs = tokenizer(['a red square', 'green stripes', 'x'], { padding: 'max_length', truncation: true });
const { text_embeds } = await text(inputs);
const images = [];
for (const number of [0, 1, 2]) {
  const { image_embeds } = await vision(await processor(await RawImage.read(`${number}.png`)));
  images.push(...image_embeds.tolist());
}
console.log(JSON.stringify({ texts: text_embeds.tolist(), images }));
