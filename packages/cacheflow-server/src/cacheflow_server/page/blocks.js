// The KV cache as a map: a square per block, from the first to the last, row by row. It is drawn pixel by pixel into one
// image, so that 100,000 blocks cost no more than the pixels they cover.

export const FREE = 0, CACHED = 1, SHARED = 2, FIRST_OWNER = 3;

// Told apart with every common colour blindness (Okabe and Ito, 2008); the yellow is darkened for a light ground.
const HUES = [
  [0, 114, 178], [230, 159, 0], [0, 158, 115], [204, 121, 167], [86, 180, 233], [213, 94, 0], [176, 160, 20],
];
const NUM_PATTERNS = 3;
export const NUM_LOOKS = HUES.length * NUM_PATTERNS;
const MAX_CELL = 14;
const HEIGHT = 160;

const packed = ([red, green, blue]) => 0xff000000 | (blue << 16) | (green << 8) | red;
const lighter = (colour) => colour.map((part) => Math.round(part + (255 - part) * 0.55));
const darker = (colour) => colour.map((part) => Math.round(part * 0.35));

/** Whether the pixel (x, y) of a square is of the second colour: none, stripes or dots. */
function isMarked(pattern, x, y, unit) {
  const u = Math.floor(x / unit), v = Math.floor(y / unit);
  return pattern === 1 ? (u + v) % 3 === 0 : pattern === 2 && u % 3 === 1 && v % 3 === 1;
}

function paint(pixels, width, left, top, size, colour, mark, pattern, unit) {
  for (let y = 0; y < size; y++) {
    const row = (top + y) * width + left;
    for (let x = 0; x < size; x++) pixels[row + x] = pattern && isMarked(pattern, x, y, unit) ? mark : colour;
  }
}

const look = (number) => ({ hue: HUES[number % HUES.length], pattern: Math.floor(number / HUES.length) % NUM_PATTERNS });
const marksOf = ({ hue, pattern }) => packed(pattern === 1 ? lighter(hue) : darker(hue));

/** Draws the swatch of one request, as its blocks look. */
export function paintSwatch(canvas, number) {
  const size = 12 * devicePixelRatio;
  canvas.width = canvas.height = size;
  const image = new ImageData(canvas.width, canvas.height);
  const shown = look(number);
  paint(new Uint32Array(image.data.buffer), canvas.width, 0, 0, canvas.width, packed(shown.hue), marksOf(shown), shown.pattern, Math.max(1, Math.round(devicePixelRatio * 1.5)));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** The largest whole number of pixels per block with which all fit; at least one, whatever the height is then. */
function cellSize(numBlocks, width, height, max) {
  let cell = max;
  while (cell > 1 && Math.ceil(numBlocks / Math.floor(width / cell)) * cell > height) cell--;
  return cell;
}

export class BlockMap {
  constructor(canvas) {
    this.canvas = canvas;
    this.blocks = [];
    this.looks = [];
    this.marked = null;
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    addEventListener("themechange", () => this.draw());
  }

  /**
   * Shows the blocks. `looks[k]` is the look of request k, which holds the blocks numbered 3 + k; `marked` is the request whose
   * blocks are brought out, or null.
   */
  show(blocks, looks, marked) {
    Object.assign(this, { blocks, looks, marked });
    this.draw();
  }

  /** The number of the block under a point of the canvas, or null. */
  blockAt(x, y) {
    const column = Math.floor((x * devicePixelRatio) / this.cell);
    const block = Math.floor((y * devicePixelRatio) / this.cell) * this.columns + column;
    return column < this.columns && block < this.blocks.length ? block : null;
  }

  draw() {
    const { canvas, blocks } = this;
    const style = getComputedStyle(document.documentElement);
    const named = (name) => style.getPropertyValue(name).match(/\d+/g).map(Number); // "rgb(1, 2, 3)"
    const width = Math.floor(canvas.clientWidth * devicePixelRatio);
    if (!blocks.length || !width) return;
    const height = Math.floor(HEIGHT * devicePixelRatio);
    this.cell = cellSize(blocks.length, width, height, Math.round(MAX_CELL * devicePixelRatio));
    this.columns = Math.floor(width / this.cell);
    const rows = Math.ceil(blocks.length / this.columns);
    const needed = rows * this.cell;
    canvas.style.height = `${needed / devicePixelRatio}px`;
    const image = new ImageData(width, needed);
    const pixels = new Uint32Array(image.data.buffer);
    const gap = this.cell > 6 * devicePixelRatio ? Math.round(2 * devicePixelRatio) : this.cell > 3 ? 1 : 0;
    const size = this.cell - gap;
    const unit = Math.max(1, Math.floor(size / 6));
    const free = packed(named("--free")), cached = packed(named("--cached")), shared = packed(named("--shared"));
    const looks = this.looks.map(look);
    const colours = looks.map(({ hue }) => packed(hue));
    const marks = looks.map(marksOf);
    blocks.forEach((kind, index) => {
      const left = (index % this.columns) * this.cell;
      const top = Math.floor(index / this.columns) * this.cell;
      const owner = kind - FIRST_OWNER;
      const isFaint = kind === FREE || (this.marked !== null && owner !== this.marked);
      const colour = isFaint ? free : kind === CACHED ? cached : kind === SHARED ? shared : colours[owner];
      const pattern = !isFaint && owner >= 0 && size >= 3 ? looks[owner].pattern : 0;
      paint(pixels, width, left, top, size, colour, marks[owner], pattern, unit);
    });
    canvas.width = width;
    canvas.height = needed;
    canvas.getContext("2d").putImageData(image, 0, 0);
  }
}
