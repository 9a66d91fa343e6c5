"""Every key that an option file may have. The reference page is made of these tables."""

from __future__ import annotations

from everyrank.apps.video_restoration.options.key import REQUIRED, Key

IGNORED = "Accepted from older files and ignored."
DERIVED = "Follows from other keys; found in the resolved options of a run, and ignored."

TOP = {
    "task": Key(REQUIRED, "str", "Name of the run; results go to `path.root/task`."),
    "model": Key("vrt", "str", "The model.", ("vrt", "plain")),
    "gpu_ids": Key(
        "auto",
        "ints|int|str|null",
        'GPUs of a run without a launcher: the first is used. Informational in a distributed run. "auto" for any.',
    ),
    "dist": Key(None, "bool|null", "Whether the run is distributed; detected, so it may be left out or be wrong."),
    "find_unused_parameters": Key(False, "bool", "DDP looks for parameters without a gradient in every step."),
    "use_static_graph": Key(False, "bool", "DDP may assume that every step uses the same parameters."),
    "scale": Key(1, "int", "How many times larger restored frames are.", (1, 2, 3, 4, 8)),
    "n_channels": Key(3, "int", "Channels of a frame."),
    "merge_bn": Key(None, "any", IGNORED),
    "merge_bn_startpoint": Key(None, "any", IGNORED),
    "logger": Key(None, "any", IGNORED),
    "num_gpu": Key(None, "any", IGNORED),
    "rank": Key(None, "any", IGNORED),
    "world_size": Key(None, "any", IGNORED),
    "is_train": Key(None, "any", IGNORED),
    "opt_path": Key(None, "any", IGNORED),
}

PATH = {
    "root": Key("experiments", "str", "Folder that all runs go to."),
    "pretrained_netG": Key(None, "str|null", "Weights to start from (`.pth` or `.safetensors`), strictly fitting."),
    "pretrained_netE": Key(None, "str|null", "Moving average of the weights to start from."),
    "pretrained_optimizerG": Key(None, "any", IGNORED),
    "options": Key(None, "any", IGNORED),
    "task": Key(None, "any", DERIVED),
    "models": Key(None, "any", DERIVED),
    "images": Key(None, "any", DERIVED),
    "log": Key(None, "any", DERIVED),
}

DATA = {
    "name": Key("dataset", "str", "A name for the log."),
    "dataset_type": Key(REQUIRED, "str", "How samples are made; see the table of dataset types."),
    "dataroot_gt": Key(
        None,
        "str|null",
        "Sharp frames: a folder of clips, an lmdb, video files, or `demo:NAME` for prepared demo data.",
    ),
    "dataroot_lq": Key(None, "str|null", "Low-quality frames, in the same form; null makes them by `degradation`."),
    "meta_info_file": Key("", "str|null", "List of clips, one a line: name, number of frames, shape, first frame."),
    "filename_tmpl": Key("08d", "str", "How a frame's number is written in its file name."),
    "filename_ext": Key("png", "str", "Extension of frame files."),
    "val_partition": Key(
        None, "str|strs|null", 'Clips held out of training: "REDS4", "official" (240-269) or a list of clip names.'
    ),
    "io_backend": Key(None, "any", '`{"type": "disk"}`, `"lmdb"` or `"video"`; null finds out by looking.'),
    "num_frame": Key(-1, "int", "Frames of a training sample; for a test clip at most this many, -1 for all."),
    "frame_range": Key(None, "ints|null", "[first, stop]: use only these frames of each clip, to hold others out."),
    "degradation": Key(
        None,
        "str|null",
        "How low-quality frames are made where `dataroot_lq` is null; null: bicubic if scale > 1, else none.",
        (None, "none", "bicubic", "blur", "noise"),
    ),
    "blur_sigma": Key(1.6, "float", "Standard deviation of the Gaussian blur, in pixels."),
    "sigma": Key(None, "float|null", "Noise level of a denoising test, of 255."),
    "sigma_min": Key(0.0, "float", "Lowest noise level in training, of 255."),
    "sigma_max": Key(50.0, "float", "Highest noise level in training, of 255."),
    "noise_seed": Key(0, "int", "Seed of the noise on test clips."),
    "cache_data": Key(False, "bool", "Keep decoded frames in memory."),
    "test_mode": Key(None, "any", IGNORED),
    "phase": Key(None, "any", DERIVED),
    "scale": Key(None, "any", DERIVED),
    "n_channels": Key(None, "any", DERIVED),
    "H_size": Key(None, "any", IGNORED),
    "temporal_scale": Key(
        None, "int|null", "Vimeo: every how many frames are input. The network tells: 2 to interpolate a frame, else 1."
    ),
    "dataloader_shuffle": Key(True, "bool", "Draw samples in a new order each epoch."),
    "dataloader_num_workers": Key(0, "int", "Loader processes in total, divided over the ranks."),
    "dataloader_batch_size": Key(1, "int", "Samples of one step in total, divided over the ranks."),
}

TRAIN_DATA = DATA | {
    "gt_size": Key(256, "int", "Height and width of the sharp patch that is cropped."),
    "interval_list": Key([1], "ints", "Distances between a sample's frames, one is drawn for each."),
    "random_reverse": Key(False, "bool", "Turn half of the samples around in time."),
    "use_hflip": Key(True, "bool", "Mirror half of the samples."),
    "use_rot": Key(True, "bool", "Mirror top to bottom and transpose, each half of the time."),
    "use_flip": Key(None, "any", IGNORED),
    "color_jitter": Key(
        False, "bool", "Change brightness, contrast, saturation and hue of a sample's frames alike, by up to 5 percent."
    ),
    "mirror_sequence": Key(False, "bool", "Vimeo: append the sequence backwards."),
    "pad_sequence": Key(False, "bool", "Vimeo: repeat the last of the 7 frames."),
    "samples_per_clip": Key(None, "int|null", "Start frames per clip and epoch; null for every possible one."),
}

TEST_DATA = DATA | {
    "cache_data": Key(True, "bool", "Keep decoded frames in memory."),
    "mirror_sequence": Key(False, "bool", "The same as `val.flip_seq`."),
    "pad_sequence": Key(False, "bool", "The same as `val.pad_seq`."),
    "border": Key(0, "int", "Pixels left out of the metrics at each side."),
}

DATASETS = {
    "train": Key(None, "any", "Training data; see below."),
    "test": Key(None, "any", "Clips to validate on; see below. Without it, nothing is validated."),
}

NET_G = {
    "net_type": Key("vrt", "str", "The network.", ("vrt",)),
    "upscale": Key(None, "int|null", "Enlargement; by default `scale`."),
    "scale": Key(None, "any", DERIVED),
    "in_chans": Key(3, "int", "Channels of an input frame."),
    "out_chans": Key(3, "int", "Channels of a restored frame."),
    "img_size": Key([6, 64, 64], "ints", "Frames, height and width of a training clip."),
    "window_size": Key([6, 8, 8], "ints", "Attention window: frames, height, width."),
    "depths": Key([8] * 7 + [4] * 6, "ints", "Blocks of each stage: seven scales, then reconstruction."),
    "indep_reconsts": Key([11, 12], "ints", "Reconstruction stages whose windows hold a single frame."),
    "embed_dims": Key([120] * 7 + [180] * 6, "ints", "Channels of each stage."),
    "num_heads": Key([6] * 13, "ints", "Attention heads of each stage."),
    "mul_attn_ratio": Key(0.75, "float", "Share of a scale's blocks with mutual attention."),
    "mlp_ratio": Key(2.0, "float", "Width of hidden layers over their input's."),
    "qkv_bias": Key(True, "bool", "Queries, keys and values have a bias."),
    "qk_scale": Key(None, "float|null", "Factor on attention scores; null for the usual one."),
    "drop_path_rate": Key(0.2, "float", "Stochastic depth of the last block; rises linearly from 0."),
    "spynet_path": Key(None, "str|null", "Weights for the flow network to start from."),
    "pa_frames": Key(
        2, "int", "Neighbouring frames aligned by parallel warping; 0 interpolates a frame.", (0, 2, 4, 6)
    ),
    "deformable_groups": Key(16, "int", "Offset groups of the alignment."),
    "recal_all_flows": Key(False, "bool", "Must be false."),
    "nonblind_denoising": Key(False, "bool", "The input's last channel is the map of noise levels."),
    "use_checkpoint_attn": Key(False, "bool", "Recompute attention in the backward pass, to save memory."),
    "use_checkpoint_ffn": Key(False, "bool", "Recompute the MLPs in the backward pass."),
    "no_checkpoint_attn_blocks": Key([], "ints", "Stages exempt from `use_checkpoint_attn`."),
    "no_checkpoint_ffn_blocks": Key([], "ints", "Stages exempt from `use_checkpoint_ffn`."),
    "init_type": Key("default", "str", "Only the network's own initialisation is known.", ("default",)),
    "init_bn_type": Key("uniform", "any", IGNORED),
    "init_gain": Key(0.2, "any", IGNORED),
}

TRAIN = {
    "G_lossfn_type": Key("charbonnier", "str", "The loss.", ("l1", "l2", "charbonnier", "ssim")),
    "G_lossfn_weight": Key(1.0, "float", "Factor on the loss."),
    "G_charbonnier_eps": Key(1e-9, "float", "Added under the root of the Charbonnier loss."),
    "E_decay": Key(0.0, "float", "Moving average of the weights, kept if above 0; it is what is validated."),
    "G_optimizer_type": Key("adam", "str", "The optimizer.", ("adam", "adamw")),
    "G_optimizer_lr": Key(4e-4, "float", "Learning rate."),
    "G_optimizer_betas": Key([0.9, 0.99], "floats", "Adam's decay rates."),
    "G_optimizer_wd": Key(0.0, "float", "Weight decay."),
    "G_optimizer_clipgrad": Key(None, "float|null", "Largest norm of the gradient; null does not clip."),
    "G_optimizer_reuse": Key(True, "bool", "Load the optimizer's state when a run goes on."),
    "fix_iter": Key(0, "int", "For so many first iterations `fix_keys` are frozen."),
    "fix_lr_mul": Key(1.0, "float", "Factor on the learning rate of `fix_keys`."),
    "fix_keys": Key([], "strs", "Parts of parameter names, for instance spynet and deform."),
    "total_iter": Key(300000, "int", "Iterations of the run."),
    "G_scheduler_type": Key(
        "CosineAnnealingWarmRestarts",
        "str|null",
        "How the learning rate falls; null keeps it.",
        ("MultiStepLR", "CosineAnnealingWarmRestarts", None),
    ),
    "G_scheduler_periods": Key(None, "int|ints|null", "Cosine: length of each period; null for `total_iter`."),
    "G_scheduler_restart_weights": Key(1, "float|floats", "Cosine: height of each period."),
    "G_scheduler_eta_min": Key(1e-7, "float", "Cosine: lowest learning rate."),
    "G_scheduler_milestones": Key([], "ints", "MultiStepLR: iterations at which the learning rate falls."),
    "G_scheduler_gamma": Key(0.5, "float", "MultiStepLR: the factor it falls by."),
    "G_param_strict": Key(True, "bool", "`path.pretrained_netG` must fit exactly."),
    "E_param_strict": Key(True, "bool", "`path.pretrained_netE` must fit exactly."),
    "checkpoint_test": Key(5000, "int", "Iterations between validations; 0 validates at the end only."),
    "checkpoint_save": Key(5000, "int", "Iterations between checkpoints; 0 saves at the end only."),
    "checkpoint_print": Key(200, "int", "Iterations between lines of the log."),
    "manual_seed": Key(0, "int|null", "Seed of weights, order and augmentation."),
    "precision": Key("fp32", "str", "Arithmetic of the network.", ("fp32", "bf16")),
    "G_regularizer_orthstep": Key(None, "any", IGNORED),
    "G_regularizer_clipstep": Key(None, "any", IGNORED),
    "F_lossfn_type": Key(None, "any", IGNORED),
    "F_lossfn_weight": Key(None, "any", IGNORED),
    "F_feature_layer": Key(None, "any", IGNORED),
    "F_weights": Key(None, "any", IGNORED),
    "F_use_input_norm": Key(None, "any", IGNORED),
    "F_use_range_norm": Key(None, "any", IGNORED),
}

VAL = {
    "save_img": Key(False, "bool", "Write restored frames as PNG."),
    "pad_seq": Key(False, "bool", "Repeat the last frame before restoring, for an even number of frames."),
    "flip_seq": Key(False, "bool", "Append the clip backwards before restoring."),
    "center_frame_only": Key(False, "bool", "Only the middle frame is restored and measured."),
    "num_frame_testing": Key(0, "int", "Frames restored together; 0 for the whole clip."),
    "num_frame_overlapping": Key(2, "int", "Frames that neighbouring parts share."),
    "size_patch_testing": Key(0, "int", "Height and width restored together; 0 for the whole frame."),
    "size_patch_overlapping": Key(20, "int", "Pixels that neighbouring patches share."),
    "side_by_side": Key(True, "bool", "Write a PNG of input, restored and sharp frame at the end."),
}

SECTIONS = {"path": PATH, "netG": NET_G, "train": TRAIN, "val": VAL}
DATA_SECTIONS = {"train": TRAIN_DATA, "test": TEST_DATA}

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
