"""Every key that an option file may have, what it may hold and what it means."""

from __future__ import annotations

from typing import Any, Literal

from everyrank import schema

IGNORED = "Accepted from older files and ignored."
DERIVED = "Follows from other keys; found in the resolved options of a run, and ignored."


def _key(default: Any, doc: str) -> Any:
    if isinstance(default, list | dict):
        return schema.field(factory=lambda: type(default)(default), doc=doc)
    return schema.field(default=default, doc=doc)


def _ignored(default: Any = None) -> Any:
    return _key(default, IGNORED)


def _derived() -> Any:
    return _key(None, DERIVED)


@schema.section
class PathOptions:
    """Where things are."""

    root: str = _key("experiments", "Folder that all runs go to.")
    pretrained_netG: str | None = _key(None, "Weights to start from (`.pth` or `.safetensors`), strictly fitting.")
    pretrained_netE: str | None = _key(None, "Moving average of the weights to start from.")
    pretrained_optimizerG: Any = _ignored()
    options: Any = _ignored()
    task: Any = _derived()
    models: Any = _derived()
    images: Any = _derived()
    log: Any = _derived()


@schema.section
class DataOptions:
    """What training and test data have in common."""

    name: str = _key("dataset", "A name for the log.")
    dataset_type: str = schema.field(doc="How samples are made; see the table of dataset types.")
    dataroot_gt: str | None = _key(
        None, "Sharp frames: a folder of clips, an lmdb, video files, or `demo:NAME` for prepared demo data."
    )
    dataroot_lq: str | None = _key(None, "Low-quality frames, in the same form; null makes them by `degradation`.")
    meta_info_file: str | None = _key("", "List of clips, one a line: name, number of frames, shape, first frame.")
    filename_tmpl: str = _key("08d", "How a frame's number is written in its file name.")
    filename_ext: str = _key("png", "Extension of frame files.")
    val_partition: str | list[str] | None = _key(
        None, 'Clips held out of training: "REDS4", "official" (240-269) or a list of clip names.'
    )
    io_backend: Any = _key(None, '`{"type": "disk"}`, `"lmdb"` or `"video"`; null finds out by looking.')
    num_frame: schema.Int = _key(-1, "Frames of a training sample; for a test clip at most this many, -1 for all.")
    frame_range: list[schema.Int] | None = _key(
        None, "[first, stop]: use only these frames of each clip, to hold others out."
    )
    degradation: Literal[None, "none", "bicubic", "blur", "noise"] = _key(
        None, "How low-quality frames are made where `dataroot_lq` is null; null: bicubic if scale > 1, else none."
    )
    blur_sigma: schema.Float = _key(1.6, "Standard deviation of the Gaussian blur, in pixels.")
    sigma: schema.Float | None = _key(None, "Noise level of a denoising test, of 255.")
    sigma_min: schema.Float = _key(0.0, "Lowest noise level in training, of 255.")
    sigma_max: schema.Float = _key(50.0, "Highest noise level in training, of 255.")
    noise_seed: schema.Int = _key(0, "Seed of the noise on test clips.")
    cache_data: schema.Bool = _key(False, "Keep decoded frames in memory.")
    test_mode: Any = _ignored()
    phase: Any = _derived()
    scale: Any = _derived()
    n_channels: Any = _derived()
    H_size: Any = _ignored()
    temporal_scale: schema.Int | None = _key(
        None, "Vimeo: every how many frames are input. The network tells: 2 to interpolate a frame, else 1."
    )
    dataloader_shuffle: schema.Bool = _key(True, "Draw samples in a new order each epoch.")
    dataloader_num_workers: schema.Int = _key(0, "Loader processes in total, divided over the ranks.")
    dataloader_batch_size: schema.Int = _key(1, "Samples of one step in total, divided over the ranks.")


@schema.section
class TrainDataOptions(DataOptions):
    """Training data."""

    gt_size: schema.Int = _key(256, "Height and width of the sharp patch that is cropped.")
    interval_list: list[schema.Int] = _key([1], "Distances between a sample's frames, one is drawn for each.")
    random_reverse: schema.Bool = _key(False, "Turn half of the samples around in time.")
    use_hflip: schema.Bool = _key(True, "Mirror half of the samples.")
    use_rot: schema.Bool = _key(True, "Mirror top to bottom and transpose, each half of the time.")
    use_flip: Any = _ignored()
    color_jitter: schema.Bool = _key(
        False, "Change brightness, contrast, saturation and hue of a sample's frames alike, by up to 5 percent."
    )
    mirror_sequence: schema.Bool = _key(False, "Vimeo: append the sequence backwards.")
    pad_sequence: schema.Bool = _key(False, "Vimeo: repeat the last of the 7 frames.")
    samples_per_clip: schema.Int | None = _key(None, "Start frames per clip and epoch; null for every possible one.")


@schema.section
class TestDataOptions(DataOptions):
    """Clips to validate on."""

    cache_data: schema.Bool = _key(True, "Keep decoded frames in memory.")
    mirror_sequence: schema.Bool = _key(False, "The same as `val.flip_seq`.")
    pad_sequence: schema.Bool = _key(False, "The same as `val.pad_seq`.")
    border: schema.Int = _key(0, "Pixels left out of the metrics at each side.")


@schema.section
class NetworkOptions:
    """The network; defaults are those of ``VRT`` (a test compares them)."""

    net_type: Literal["vrt"] = _key("vrt", "The network.")
    upscale: schema.Int | None = _key(None, "Enlargement; by default `scale`.")
    scale: Any = _derived()
    in_chans: schema.Int = _key(3, "Channels of an input frame.")
    out_chans: schema.Int = _key(3, "Channels of a restored frame.")
    img_size: list[schema.Int] = _key([6, 64, 64], "Frames, height and width of a training clip.")
    window_size: list[schema.Int] = _key([6, 8, 8], "Attention window: frames, height, width.")
    depths: list[schema.Int] = _key([8] * 7 + [4] * 6, "Blocks of each stage: seven scales, then reconstruction.")
    indep_reconsts: list[schema.Int] = _key([11, 12], "Reconstruction stages whose windows hold a single frame.")
    embed_dims: list[schema.Int] = _key([120] * 7 + [180] * 6, "Channels of each stage.")
    num_heads: list[schema.Int] = _key([6] * 13, "Attention heads of each stage.")
    mul_attn_ratio: schema.Float = _key(0.75, "Share of a scale's blocks with mutual attention.")
    mlp_ratio: schema.Float = _key(2.0, "Width of hidden layers over their input's.")
    qkv_bias: schema.Bool = _key(True, "Queries, keys and values have a bias.")
    qk_scale: schema.Float | None = _key(None, "Factor on attention scores; null for the usual one.")
    drop_path_rate: schema.Float = _key(0.2, "Stochastic depth of the last block; rises linearly from 0.")
    spynet_path: str | None = _key(None, "Weights for the flow network to start from.")
    pa_frames: Literal[0, 2, 4, 6] = _key(2, "Neighbouring frames aligned by parallel warping; 0 interpolates a frame.")
    deformable_groups: schema.Int = _key(16, "Offset groups of the alignment.")
    recal_all_flows: schema.Bool = _key(False, "Must be false.")
    nonblind_denoising: schema.Bool = _key(False, "The input's last channel is the map of noise levels.")
    use_checkpoint_attn: schema.Bool = _key(False, "Recompute attention in the backward pass, to save memory.")
    use_checkpoint_ffn: schema.Bool = _key(False, "Recompute the MLPs in the backward pass.")
    no_checkpoint_attn_blocks: list[schema.Int] = _key([], "Stages exempt from `use_checkpoint_attn`.")
    no_checkpoint_ffn_blocks: list[schema.Int] = _key([], "Stages exempt from `use_checkpoint_ffn`.")
    init_type: Literal["default"] = _key("default", "Only the network's own initialisation is known.")
    init_bn_type: Any = _ignored("uniform")
    init_gain: Any = _ignored(0.2)


@schema.section
class TrainOptions:
    """The training."""

    G_lossfn_type: Literal["l1", "l2", "charbonnier", "ssim"] = _key("charbonnier", "The loss.")
    G_lossfn_weight: schema.Float = _key(1.0, "Factor on the loss.")
    G_charbonnier_eps: schema.Float = _key(1e-09, "Added under the root of the Charbonnier loss.")
    E_decay: schema.Float = _key(0.0, "Moving average of the weights, kept if above 0; it is what is validated.")
    G_optimizer_type: Literal["adam", "adamw"] = _key("adam", "The optimizer.")
    G_optimizer_lr: schema.Float = _key(0.0004, "Learning rate.")
    G_optimizer_betas: list[schema.Float] = _key([0.9, 0.99], "Adam's decay rates.")
    G_optimizer_wd: schema.Float = _key(0.0, "Weight decay.")
    G_optimizer_clipgrad: schema.Float | None = _key(None, "Largest norm of the gradient; null does not clip.")
    G_optimizer_reuse: schema.Bool = _key(True, "Load the optimizer's state when a run goes on.")
    fix_iter: schema.Int = _key(0, "For so many first iterations `fix_keys` are frozen.")
    fix_lr_mul: schema.Float = _key(1.0, "Factor on the learning rate of `fix_keys`.")
    fix_keys: list[str] = _key([], "Parts of parameter names, for instance spynet and deform.")
    total_iter: schema.Int = _key(300000, "Iterations of the run.")
    G_scheduler_type: Literal["MultiStepLR", "CosineAnnealingWarmRestarts", None] = _key(
        "CosineAnnealingWarmRestarts", "How the learning rate falls; null keeps it."
    )
    G_scheduler_periods: schema.Int | list[schema.Int] | None = _key(
        None, "Cosine: length of each period; null for `total_iter`."
    )
    G_scheduler_restart_weights: schema.Float | list[schema.Float] = _key(1, "Cosine: height of each period.")
    G_scheduler_eta_min: schema.Float = _key(1e-07, "Cosine: lowest learning rate.")
    G_scheduler_milestones: list[schema.Int] = _key([], "MultiStepLR: iterations at which the learning rate falls.")
    G_scheduler_gamma: schema.Float = _key(0.5, "MultiStepLR: the factor it falls by.")
    G_param_strict: schema.Bool = _key(True, "`path.pretrained_netG` must fit exactly.")
    E_param_strict: schema.Bool = _key(True, "`path.pretrained_netE` must fit exactly.")
    checkpoint_test: schema.Int = _key(5000, "Iterations between validations; 0 validates at the end only.")
    checkpoint_save: schema.Int = _key(5000, "Iterations between checkpoints; 0 saves at the end only.")
    checkpoint_print: schema.Int = _key(200, "Iterations between lines of the log.")
    manual_seed: schema.Int | None = _key(0, "Seed of weights, order and augmentation.")
    precision: Literal["fp32", "bf16"] = _key("fp32", "Arithmetic of the network.")
    G_regularizer_orthstep: Any = _ignored()
    G_regularizer_clipstep: Any = _ignored()
    F_lossfn_type: Any = _ignored()
    F_lossfn_weight: Any = _ignored()
    F_feature_layer: Any = _ignored()
    F_weights: Any = _ignored()
    F_use_input_norm: Any = _ignored()
    F_use_range_norm: Any = _ignored()


@schema.section
class ValOptions:
    """Restoring the test clips."""

    save_img: schema.Bool = _key(False, "Write restored frames as PNG.")
    pad_seq: schema.Bool = _key(False, "Repeat the last frame before restoring, for an even number of frames.")
    flip_seq: schema.Bool = _key(False, "Append the clip backwards before restoring.")
    center_frame_only: schema.Bool = _key(False, "Only the middle frame is restored and measured.")
    num_frame_testing: schema.Int = _key(0, "Frames restored together; 0 for the whole clip.")
    num_frame_overlapping: schema.Int = _key(2, "Frames that neighbouring parts share.")
    size_patch_testing: schema.Int = _key(0, "Height and width restored together; 0 for the whole frame.")
    size_patch_overlapping: schema.Int = _key(20, "Pixels that neighbouring patches share.")
    side_by_side: schema.Bool = _key(
        True, "Write a PNG of one frame at the end, with the part that changed most enlarged."
    )


@schema.section
class DatasetsOptions:
    """The data; at least one of the two."""

    train: TrainDataOptions | None = _key(None, "Training data.")
    test: TestDataOptions | None = _key(None, "Clips to validate on. Without it, nothing is validated.")


@schema.section
class Options:
    """An option file."""

    task: str = schema.field(doc="Name of the run; results go to `path.root/task`.")
    model: Literal["vrt", "plain"] = _key("vrt", "The model.")
    gpu_ids: list[schema.Int] | schema.Int | str | None = _key(
        "auto",
        'GPUs of a run without a launcher: the first is used. Informational in a distributed run. "auto" for any.',
    )
    dist: schema.Bool | None = _key(
        None, "Whether the run is distributed; detected, so it may be left out or be wrong."
    )
    find_unused_parameters: schema.Bool = _key(False, "DDP looks for parameters without a gradient in every step.")
    use_static_graph: schema.Bool = _key(False, "DDP may assume that every step uses the same parameters.")
    scale: Literal[1, 2, 3, 4, 8] = _key(1, "How many times larger restored frames are.")
    n_channels: schema.Int = _key(3, "Channels of a frame.")
    merge_bn: Any = _ignored()
    merge_bn_startpoint: Any = _ignored()
    logger: Any = _ignored()
    num_gpu: Any = _ignored()
    rank: Any = _ignored()
    world_size: Any = _ignored()
    is_train: Any = _ignored()
    opt_path: Any = _ignored()
    path: PathOptions = schema.field(factory=PathOptions, doc="Where things are.")
    datasets: DatasetsOptions = schema.field(factory=DatasetsOptions, doc="The data.")
    netG: NetworkOptions = schema.field(factory=NetworkOptions, doc="The network.")
    train: TrainOptions = schema.field(factory=TrainOptions, doc="The training.")
    val: ValOptions = schema.field(factory=ValOptions, doc="Restoring the test clips.")
    trainer: dict[str, Any] = _key(
        {},
        "Sections of `TrainerDDP`, for what no key above says: `training.ledger`, `training.accumulation_steps`, "
        "`parallel.strategy`, ...; see its configuration reference. They win over what follows from the keys above.",
    )


DATASET_TYPES = {
    "VideoRecurrentTrainDataset": "Clips of `num_frame` frames, cropped and augmented.",
    "VideoRecurrentTrainNonblindDenoisingDataset": "The same with Gaussian noise of a level drawn for each sample.",
    "VideoRecurrentTrainVimeoDataset": "Sequences of 7 frames from a Vimeo-style list.",
    "VideoRecurrentTrainVimeoVFIDataset": "Frames 1, 3, 5, 7 of a sequence in, frame 4 out.",
    "VideoRecurrentTestDataset": "Whole clips.",
    "VideoTestVimeo90KDataset": "Sequences of 7 frames from a Vimeo-style list.",
    "VideoTestVimeo90KVFIDataset": "Frames 1, 3, 5, 7 of a sequence in, frame 4 out.",
    "SingleVideoRecurrentTestDataset": "Whole clips without sharp frames: restored, not measured.",
}
