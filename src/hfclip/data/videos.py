"""Videos as images: the middle frame of each, or several frames at equal distances.

A video is a folder of frames, whose names sort them, or a file that PyAV decodes (`pip install 'hfclip[video]'`).
"""

import posixpath
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..errors import UsageError
from .files import CLASS_NAMES, read_lines
from .folders import ending
from .samples import IMAGE_ENDINGS, BadSample, Sample, Source


VIDEO_ENDINGS = tuple("mp4 avi mkv mov webm mpg mpeg m4v".split())


class VideoFrames(Source):
    """Frames of the videos in class folders, `num_frames` of each video one after the other.

    Sample i is frame i % num_frames of video i // num_frames. Of n frames the j-th of a video with t is number
    floor((j + 1/2) t / n): for one it is the middle frame, which the paper takes (appendix A).

    Args:
        folder: holds a folder per class, with videos in it. `classnames.txt` in it, or above, names them in order.
        num_frames: of each video.

    Raises:
        UsageError: there are no videos, or fewer than two classes.
    """

    def __init__(self, folder: str | Path, num_frames: int = 1):
        super().__init__()
        if num_frames < 1:
            raise UsageError(f"num_frames is {num_frames}, expected 1 or more.")
        folder, self.num_frames = Path(folder), num_frames
        classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        videos = [sorted(_videos_in(path)) for path in classes]
        self.labels = read_lines(folder, CLASS_NAMES) if classes else None
        self.labels = self.labels or [path.name.replace("_", " ") for path in classes]
        if len(classes) < 2 or not any(videos) or len(self.labels) != len(classes):
            raise UsageError(
                f"{folder} holds {len(classes)} folders with {sum(map(len, videos))} videos for {len(self.labels)} class "
                "names, expected two classes or more, each a folder of videos: folders of frames, or files "
                f"({', '.join(VIDEO_ENDINGS)})."
            )
        self.folder, self.videos = folder, [(path, number) for number, of in enumerate(videos) for path in of]
        self.length, self.decoded = len(self.videos) * num_frames, (None, [])
        if any(path.is_file() for path, _ in self.videos):
            _import_av()

    def __getitem__(self, index: int) -> Sample:
        (path, _), number = self.videos[index // self.num_frames], index % self.num_frames
        read = self._frame_in_folder if path.is_dir() else self._frame_of_file
        return self._sample(index, read(path, number))

    def _sample(self, index: int, image: bytes | Image.Image) -> Sample:
        (path, label), number = self.videos[index // self.num_frames], index % self.num_frames
        key = posixpath.join(path.relative_to(self.folder).as_posix(), str(number))
        return Sample(image, [self.labels[label]], key, label)

    def content(self, index: int) -> Sample:
        """The bytes of a video file in place of its frame, whose number the key has."""
        path, _ = self.videos[index // self.num_frames]
        made_of = path.read_bytes() + f" {self.num_frames} frames".encode() if path.is_file() else None
        return self[index] if made_of is None else self._sample(index, made_of)

    def captions(self, index: int) -> list[str]:
        return [self.labels[self.label(index)]]

    def label(self, index: int) -> int:
        return self.videos[index // self.num_frames][1]

    def _place(self, number: int, total: int) -> int:
        return (2 * number + 1) * total // (2 * self.num_frames)

    def _frame_in_folder(self, path: Path, number: int) -> bytes:
        frames = sorted(frame for frame in path.iterdir() if ending(frame.name) in IMAGE_ENDINGS)
        try:
            return frames[self._place(number, len(frames))].read_bytes()
        except OSError as error:
            raise BadSample("missing image", str(error)) from error

    def _frame_of_file(self, path: Path, number: int) -> Image.Image:
        if self.decoded[0] != path:  # the frames of a video are asked for one after the other
            self.decoded = path, self._decode(path)
        return self.decoded[1][number]

    def _decode(self, path: Path) -> list[Image.Image]:
        av = _import_av()
        try:
            with av.open(str(path)) as video:
                total = sum(1 for _ in video.decode(video=0))  # what a header promises may not be there
            places = [self._place(number, total) for number in range(self.num_frames)]
            with av.open(str(path)) as video:
                wanted = {
                    place: frame.to_image() for place, frame in enumerate(video.decode(video=0)) if place in places
                }
            return [wanted[place] for place in places]
        except (av.FFmpegError, IndexError, KeyError) as error:
            raise BadSample("unreadable image") from error


def _videos_in(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and any(ending(frame.name) in IMAGE_ENDINGS for frame in path.iterdir()):
            yield path
        elif path.is_file() and ending(path.name) in VIDEO_ENDINGS:
            yield path


def _import_av():
    try:
        import av
    except ImportError as error:
        raise UsageError("Video files are decoded by PyAV: `pip install 'hfclip[video]'`.") from error
    return av
